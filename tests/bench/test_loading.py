"""The measurements of loading: what they count, their rows, and their table."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("psutil")
import psutil

from bench import loading
from bench.__main__ import main
from bench.rows import read_rows
from bench.tables import TABLES
from tokenmix_ops.video.data.cache import FrameCache
from tokenmix_ops.video.data.clips import read_clip

TINY = loading.Files(files=2, width=64, height=48, seconds=1.0)
NAMES = 8


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return loading.write_videos(tmp_path_factory.mktemp("videos") / "tiny", TINY, NAMES)


def test_videos_are_what_they_are_said_to_be(manifest):
    paths = [manifest.path_of(video) for video in manifest.videos]
    assert len({path.stat().st_ino for path in paths}) == 2
    frames = read_clip(paths[0], 26, (48, 64))
    # All move but the last two, which are one.
    assert [i for i in range(25) if frames[i].equal(frames[i + 1])] == [0]
    assert not frames.equal(read_clip(paths[1], 26, (48, 64)))
    assert read_clip(paths[0], 1, start=0.96).shape[0] == 1
    assert torch.equal(read_clip(paths[0]), read_clip(paths[2]))


def test_rows_come_out_and_become_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "LONG", TINY)
    # Two new interpreters for each round would import PyTorch.
    seconds = {"fork": iter((0.25, 0.5)), "spawn": iter((9.0, 4.0))}
    monkeypatch.setattr(loading, "start_seconds", lambda _, start, **frames: next(seconds[start]))
    said = []
    options = {"size": 16, "long": TINY, "short": TINY, "progress": said.append}
    rows = list(loading.loading_rows(tmp_path, clips=40, names=NAMES * 2, rounds=2, **options))
    assert len(said) == 1 + 2 * len(loading.READINGS) + 2 + 2
    speeds = [row for row in rows if row["measure"] == "speed"]
    assert [(row["workers"], row["fps"], row["cache"]) for row in speeds] == [
        (reading.workers, reading.fps, reading.cache) for reading in loading.READINGS
    ]
    assert all(min(r["rounds"]) <= r["clips_per_second"] <= max(r["rounds"]) for r in speeds)
    starts = [row for row in rows if row["measure"] == "start"]
    assert [(row["start"], row["seconds"], row["rounds"]) for row in starts] == [
        ("fork", 0.38, [0.25, 0.5]),
        ("spawn", 6.5, [9.0, 4.0]),
    ]
    for row in rows[-2:]:
        assert set(row["mib"]) == {"10", "50", "100"}
        assert 100 < row["mib"]["10"] <= row["peak_mib"]
        assert row["growth_mib"] == pytest.approx(row["mib"]["100"] - row["mib"]["10"], abs=0.11)
    assert [row["cache"] for row in rows[-2:]] == [None, "warm"]
    assert {"hardware", "torch", "av", "commit"} <= rows[0].keys()
    table = TABLES["loading"](rows)
    assert "| all frames | 2 |" in table
    assert "4 frames a second, from the cache" in table
    assert "6.5 s by spawn" in table
    assert TABLES["loading"](rows[:3]).startswith("| clips drawn from")


def test_a_pass_fills_the_cache_and_the_next_reads_it(manifest, tmp_path, monkeypatch):
    options = {"num_frames": 2, "size": 16}
    assert loading.clips_per_second(
        manifest, loading.Reading(1, 4.0, "cold"), tmp_path, 0, **options
    )
    kept = sorted(tmp_path.glob("??/*"))
    assert len(kept) == NAMES
    stamps = [file.stat().st_mtime_ns for file in kept]
    monkeypatch.setattr(FrameCache, "_added", None)
    assert loading.clips_per_second(
        manifest, loading.Reading(0, 4.0, "warm"), tmp_path, 0, **options
    )
    assert [file.stat().st_mtime_ns for file in kept] == stamps


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_start_is_timed_until_two_workers_have_read(manifest, monkeypatch, start):
    real, asked = loading._loader, []

    def loader(clips, keys, workers, batch, how):
        asked.append((keys, workers, batch, how))
        # A new interpreter would import PyTorch.
        return real(clips, keys, workers, batch, "fork")

    monkeypatch.setattr(loading, "_loader", loader)
    assert loading.start_seconds(manifest, start, num_frames=2, size=16) > 0
    assert asked == [([(0, 0), (0, 1)], 2, 1, start)]


class Process:
    """This process has a child; what they share, a system may count as half of each or twice."""

    def memory_full_info(self):
        return self.info

    def children(self, recursive):
        assert recursive
        return [self]


@pytest.mark.parametrize(
    ("info", "kind", "mib"),
    [
        (SimpleNamespace(rss=3 << 20, pss=2 << 20), "proportional set", 4),
        (SimpleNamespace(rss=3 << 20), "resident set", 6),
    ],
)
def test_memory_is_that_of_all_processes(monkeypatch, info, kind, mib):
    monkeypatch.setattr(psutil, "Process", type("Process", (Process,), {"info": info}))
    assert loading.memory_mib() == (kind, mib)


def own_mib():
    """What no other process shares: those beside a test come and go."""
    both = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return "unique set", sum(process.memory_full_info().uss for process in both) / 2**20


@pytest.mark.parametrize("kept", [False, True])
def test_memory_does_not_grow_with_the_clips(manifest, tmp_path, monkeypatch, kept):
    """Unless memory goes back to the system, the heap of a worker grows by a clip with each."""
    monkeypatch.setattr(loading, "memory_mib", own_mib)
    cache = FrameCache(tmp_path, 1 << 30) if kept else None
    row = loading.memory_row(manifest, 140, cache, num_frames=8, size=224)
    clip_mib = 8 * 3 * 224 * 224 * 4 / 2**20
    assert row["growth_mib"] < 140 * clip_mib / 24


def test_too_few_clips_to_time_are_refused(tmp_path):
    with pytest.raises(ValueError, match="names is 11, it must be at least 12"):
        next(loading.loading_rows(tmp_path, names=11))


def test_the_command_writes_rows_and_prints_their_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "READINGS", loading.READINGS[:1])
    real = loading.loading_rows
    monkeypatch.setattr(
        loading,
        "loading_rows",
        lambda folder, **given: real(folder, size=16, long=TINY, short=TINY, **given),
    )
    monkeypatch.setattr(loading, "start_seconds", lambda *arguments, **options: 1.0)
    sizes = ("--clips", "40", "--names", "16", "--rounds", "1")
    main(["loading", "--results", str(tmp_path), *sizes])
    rows = read_rows(tmp_path / "loading-cpu.jsonl")
    assert [row["measure"] for row in rows] == ["speed", "start", "start", "memory", "memory"]
    table = TABLES["loading"](rows)
    assert table in capsys.readouterr().out
