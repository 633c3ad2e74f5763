"""The measurements of loading: what they count, their rows, and their table."""

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("psutil")
from tokenmix_ops.bench import loading
from tokenmix_ops.bench.render import TABLES, read_rows
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
    assert [row["start"] for row in starts] == ["fork", "spawn"]
    # A new interpreter has PyTorch to import.
    assert starts[0]["seconds"] < starts[1]["seconds"]
    for row in rows[-2:]:
        assert set(row["mib"]) == {"10", "50", "100"}
        assert 100 < row["mib"]["10"] <= row["peak_mib"]
        assert row["growth_mib"] == pytest.approx(row["mib"]["100"] - row["mib"]["10"], abs=0.11)
    assert [row["cache"] for row in rows[-2:]] == [None, "warm"]
    assert {"hardware", "torch", "av", "commit"} <= rows[0].keys()
    table = TABLES["loading"](rows)
    assert "| all frames | 2 |" in table
    assert "4 frames a second, from the cache" in table
    assert f"{starts[1]['seconds']:.1f} s by spawn" in table
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


def test_memory_counts_what_workers_hold():
    kind, before = loading.memory_mib()
    assert kind in ("proportional set", "resident set")
    held = torch.ones(40 << 18)
    assert loading.memory_mib()[1] - before == pytest.approx(40, abs=6)
    del held


@pytest.mark.parametrize("kept", [False, True])
def test_memory_does_not_grow_with_the_clips(manifest, tmp_path, kept):
    """Unless memory goes back to the system, the heap of a worker grows by a clip with each."""
    cache = FrameCache(tmp_path, 1 << 30) if kept else None
    row = loading.memory_row(manifest, 240, cache, num_frames=8, size=224)
    clip_mib = 8 * 3 * 224 * 224 * 4 / 2**20
    assert row["growth_mib"] < 240 * clip_mib / 6


def test_too_few_clips_to_time_are_refused(tmp_path):
    with pytest.raises(ValueError, match="names is 11, it must be at least 12"):
        next(loading.loading_rows(tmp_path, names=11))


def test_the_command_writes_rows_and_renders_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "READINGS", loading.READINGS[:1])
    real = loading.loading_rows
    monkeypatch.setattr(
        loading,
        "loading_rows",
        lambda folder, **given: real(folder, size=16, long=TINY, short=TINY, **given),
    )
    monkeypatch.setattr(loading, "start_seconds", lambda *arguments, **options: 1.0)
    (tmp_path / "README.md").write_text(
        "<!-- rendered: loading-cpu -->\n<!-- end of rendered -->\n"
    )
    out = tmp_path / "results"
    loading.main(["--out", str(out), "--clips", "40", "--names", "16", "--rounds", "1"])
    rows = read_rows(out / "loading-cpu.jsonl")
    assert [row["measure"] for row in rows] == ["speed", "start", "start", "memory", "memory"]
    table = TABLES["loading"](rows)
    assert table in (tmp_path / "README.md").read_text()
    assert table in capsys.readouterr().out
