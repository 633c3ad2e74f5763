"""``tokenmix data check`` as a user types it."""

import json

import pytest
from media import write_video

from tokenmix_ops.video import cli
from tokenmix_ops.video.data import isolation
from tokenmix_ops.video.data.manifest import Video, write_manifest


def run(capsys, *arguments):
    """(exit status, standard output, standard error) of ``tokenmix data check``."""
    status = 0
    try:
        cli.main(["data", "check", *map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    if isinstance(status, str):
        return 1, captured.out, captured.err + status
    return status, captured.out, captured.err


@pytest.fixture
def forked(monkeypatch, processes):
    """Videos are read in forked processes: those that it spawns import everything again."""
    monkeypatch.setattr(isolation, "get_context", lambda _: processes)


@pytest.fixture
def data(tmp_path):
    """Three videos for training, of which one is missing and one damaged; a short one for tests."""
    write_video(tmp_path / "good.mp4", stamps=range(20))
    write_video(tmp_path / "short.mp4", stamps=range(5))
    (tmp_path / "bad[1].mp4").write_bytes(b"no video" * 9)
    videos = [
        *(Video(f"{name}.mp4", name, ("one", "two"), "train") for name in ("good", "gone")),
        Video("bad[1].mp4", "bad", ("one",), "train"),
        Video("short.mp4", "short", (), "test"),
    ]
    path = write_manifest(tmp_path / "videos.jsonl", videos)
    lines = path.read_text()
    path.write_text(lines + lines.splitlines()[0] + "\n")
    return path


@pytest.mark.usefixtures("forked")
def test_report_as_table_and_json(capsys, data, tmp_path):
    file = tmp_path / "new" / "report.json"
    status, out, _ = run(capsys, data, "--report", file)
    assert status == 0
    words = " ".join(out.split())
    assert f"gone ({tmp_path}/gone.mp4): does not exist" in words
    assert f"train, bad ({tmp_path}/bad[1].mp4): cannot be read: Invalid data" in words
    assert "1 duplicate: line 5: video_id 'good' already appears in line 1" in words
    assert "5 captions" in words
    assert "This is the reading alone" in words
    figures = json.loads(file.read_text())
    train, test = figures["splits"]["train"], figures["splits"]["test"]
    counts = ("videos", "captions", "ok", "missing", "unreadable", "short")
    assert [train[name] for name in counts] == [3, 5, 1, 1, 1, 0]
    assert [test[name] for name in counts] == [1, 0, 1, 0, 0, 1]
    assert [one["video_id"] for one in figures["unusable"]] == ["gone", "bad"]
    assert figures["epoch"]["captions"] == 5
    assert [one["kind"] for one in figures["problems"]] == ["duplicate"]


def test_strict_fails_after_the_report(capsys, data):
    status, out, err = run(capsys, data, "--strict", "--json", "--workers", "1")
    assert status == 1
    assert len(json.loads(out)["unusable"]) == 2
    assert err.strip().splitlines()[-1] == (
        "tokenmix: 2 of 4 videos are missing or unreadable; 1 duplicate"
    )


@pytest.mark.usefixtures("forked")
def test_split_and_clip_are_chosen(capsys, data):
    arguments = ("--split", "test", "--json", "--num-frames", "4", "--workers", "1", "--thorough")
    status, out, _ = run(capsys, data, *arguments)
    assert status == 0
    figures = json.loads(out)
    assert list(figures["splits"]) == ["test"]
    assert (figures["splits"]["test"]["short"], figures["short"]) == (0, [])
    status, out, err = run(capsys, data, "--split", "val")
    assert (status, out) == (1, "")
    assert "videos.jsonl has no videos in val: 1 duplicate" in err


@pytest.mark.usefixtures("forked")
def test_wrong_root_is_guessed(capsys, data, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    arguments = ("--root", tmp_path / "elsewhere", "--json", "--workers", "1")
    status, out, err = run(capsys, data, *arguments)
    assert status == 0
    assert json.loads(out)["splits"]["train"]["missing"] == 3
    assert f"no video is below {tmp_path}/elsewhere: is --root right?" in err
