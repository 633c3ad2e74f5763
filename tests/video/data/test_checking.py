"""What a check says of videos that are fine, missing, damaged, short, hanging and crashing."""

import os
import signal
from dataclasses import replace

import av
import pytest
from media import RATE, SIDE, picture, write_image, write_video
from waiting import stop_clock

from tokenmix_ops.video.data import checking, isolation
from tokenmix_ops.video.data.check_report import report
from tokenmix_ops.video.data.checking import Check, check_videos, examine
from tokenmix_ops.video.data.manifest import Manifest, Problem, Video


def video(path, split="train", start=None, end=None):
    captions = ("a", "b") if split == "train" else ()
    return Video(str(path), f"{path} {start} {end}", captions, split, start, end)


def check(folder, path, thorough=False, start=None, end=None):
    return examine(Check(video(path, "test", start, end), folder / path, 8, 32, thorough))


def hang_or_crash(task):
    if "hang" in task.video.video:
        task.path.with_suffix(".hangs").touch()
        signal.pause()
    if "crash" in task.video.video:
        os.kill(os.getpid(), signal.SIGSEGV)
    return examine(task)


def images(folder, count):
    folder.mkdir()
    for i in range(count):
        write_image(folder / f"{i}.jpg", picture(i, 40, 48))
    return folder


# The last has hidden frames, so that only decoding tells their number.
@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize(
    ("name", "encoder"), [("a.mp4", "libx264"), ("a.mkv", "mpeg4"), ("a.webm", "libvpx")]
)
def test_facts_of_a_video(tmp_path, name, encoder, thorough):
    write_video(tmp_path / name, encoder, {"g": "12"}, range(45), SIDE, 48)
    whole = check(tmp_path, name, thorough)
    assert (whole.status, whole.error, whole.path) == ("ok", None, tmp_path / name)
    assert (whole.num_frames, whole.fps, whole.width, whole.height) == (45, RATE, SIDE, 48)
    assert whole.duration == pytest.approx(4.5, abs=0.06)
    assert whole.seconds > 0
    part = check(tmp_path, name, thorough, 1.0, 1.5)
    assert (part.status, part.num_frames, part.duration) == ("ok", 5, 0.5)
    rest = check(tmp_path, name, thorough, start=4.0)
    assert (rest.status, rest.num_frames) == ("ok", 5)
    assert rest.duration == pytest.approx(0.5, abs=0.06)
    late = check(tmp_path, name, thorough, start=9.0)
    assert late.status == "unreadable"
    assert late.error == (
        "expected frames in [9.0, inf) s, got none; the last one before is at 4.400 s"
    )


def test_folder_of_images(tmp_path):
    images(tmp_path / "frames", 20)
    found = check(tmp_path, "frames")
    assert (found.status, found.num_frames, found.duration, found.fps) == ("ok", 20, None, None)
    assert (found.width, found.height) == (48, 40)
    assert check(tmp_path, "frames", start=1.0).error == (
        "a folder of images has no timestamps: omit start and end"
    )
    # Not among the 8 of the clip.
    (tmp_path / "frames" / "1.jpg").write_bytes(b"nothing")
    assert check(tmp_path, "frames").status == "ok"
    thorough = check(tmp_path, "frames", thorough=True)
    assert thorough.status == "unreadable"
    assert thorough.error == f"{tmp_path}/frames/1.jpg: is not a JPEG or PNG image"


def test_thorough_finds_damage_that_the_clip_does_not_touch(tmp_path):
    path = write_video(tmp_path / "a.mp4", "libx264", {"g": "4", "bf": "0"}, range(64))
    with av.open(str(path)) as container:
        victim = [p for p in container.demux(video=0) if p.size][5]
    data = bytearray(path.read_bytes())
    data[victim.pos : victim.pos + victim.size] = b"\xa5" * victim.size
    path.write_bytes(data)
    assert check(tmp_path, "a.mp4").status == "ok"
    thorough = check(tmp_path, "a.mp4", thorough=True)
    assert thorough.status == "unreadable"
    assert thorough.error.startswith("frame 5 of 64 depends on damaged data; ")
    # Nor does the check of another part.
    assert check(tmp_path, "a.mp4", True, start=1.0).status == "ok"


def test_reasons(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(b"noise" * 99)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    found = {
        name: check(tmp_path, name)
        for name in ("empty.mp4", "noise.mp4", "nothing", "dangling.mp4", "pipe.mp4", "no.mp4")
    }
    assert {name: (one.status, one.error) for name, one in found.items()} == {
        "empty.mp4": ("unreadable", "is empty"),
        "noise.mp4": (
            "unreadable",
            "cannot be read: Invalid data found when processing input",
        ),
        "nothing": ("unreadable", "has no numbered .jpg, .jpeg or .png images"),
        "dangling.mp4": ("missing", "does not exist"),
        "pipe.mp4": ("unreadable", "is neither a file nor a folder"),
        "no.mp4": ("missing", "does not exist"),
    }


def test_processes_report_in_order_whatever_a_video_does(tmp_path, monkeypatch, processes):
    # In place of spawned ones, which import everything again.
    monkeypatch.setattr(isolation, "get_context", lambda _: processes)
    monkeypatch.setattr(checking, "examine", hang_or_crash)
    stop_clock(monkeypatch, (tmp_path / "hang.hangs").exists)
    for name in ("hang.mp4", "crash.mp4", "a.mp4", "b.mp4"):
        write_video(tmp_path / name, stamps=range(10))
    names = ("a.mp4", "hang.mp4", "no.mp4", "crash.mp4", "b.mp4")
    videos = [video(name) for name in names]
    manifest = Manifest(tuple(videos), tmp_path)
    options = {"workers": 1, "num_frames": 4, "size": 32, "time_limit": 3.0}
    found = list(check_videos(manifest, videos, **options))
    assert [one.video for one in found] == videos
    assert [one.path for one in found] == [tmp_path / name for name in names]
    assert [(one.status, one.error) for one in found] == [
        ("ok", None),
        ("unreadable", "took more than 3 s"),
        ("missing", "does not exist"),
        ("unreadable", "crashed the process reading it (SIGSEGV)"),
        ("ok", None),
    ]
    assert found[1].seconds == 1000.0


@pytest.mark.parametrize(
    "wrong", [{"workers": 0}, {"num_frames": 0}, {"size": 0}, {"time_limit": 0.0}]
)
def test_arguments_out_of_range_raise_at_once(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got 0"):
        check_videos(Manifest((), tmp_path), [], **wrong)


def test_report(tmp_path):
    def found(split, status="ok", **facts):
        one = replace(check(tmp_path, "no.mp4"), video=video("v", split), status=status, error=None)
        return replace(one, **facts)

    checked = [
        found("train", duration=4.0, num_frames=40, fps=10.0, width=64, height=48, seconds=0.1),
        found("train", duration=2.0, num_frames=7, fps=20.0, width=64, height=48, seconds=0.3),
        found("train", "unreadable", error="is empty", seconds=50.0),
        found("test", "missing", error="does not exist"),
        found("test", num_frames=9, width=10, height=10),
    ]
    problem = Problem("duplicate", "line 7", "video_id 'a'")
    manifest = Manifest(tuple(one.video for one in checked), tmp_path, (problem,))
    figures = report(manifest, checked, num_frames=8, workers=2)
    train, test = figures["splits"]["train"], figures["splits"]["test"]
    counts = ("videos", "captions", "ok", "missing", "unreadable", "short")
    assert [train[name] for name in counts] == [3, 6, 2, 0, 1, 1]
    assert [test[name] for name in counts] == [2, 0, 1, 1, 0, 0]
    assert train["duration"] == {"total": 6.0, "min": 2.0, "median": 3.0, "max": 4.0}
    assert train["num_frames"] == {"min": 7, "median": 23.5, "max": 40}
    assert (test["duration"], test["fps"]) == (None, None)
    assert [one["error"] for one in figures["unusable"]] == ["is empty", "does not exist"]
    assert [one["num_frames"] for one in figures["short"]] == [7]
    assert figures["problems"] == [{"kind": "duplicate", "where": "line 7", "what": "video_id 'a'"}]
    # 6 captions of 0.2 s each, by two workers.
    assert figures["epoch"]["seconds"] == pytest.approx(0.6)
    assert report(manifest, checked[3:], num_frames=8, workers=2)["epoch"] is None
