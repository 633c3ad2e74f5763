"""A file that is no video, or not all of one, raises with its path and the reason."""

import os

import pytest
import torch
from media import write_video

from tokenmix_ops.video.data.clips import ClipError, read_clip


def no_file(folder):
    return folder / "a.mp4", "cannot be read: No such file or directory"


def empty_file(folder):
    (folder / "a.mp4").touch()
    return folder / "a.mp4", "is empty"


def text_named_video(folder):
    (folder / "a.mp4").write_text("hello world\n" * 50)
    return folder / "a.mp4", "cannot be read: Invalid data found when processing input"


def text_that_ffmpeg_draws(folder):
    (folder / "a.txt").write_text("hello world\n" * 50)
    return folder / "a.txt", "is text, not a video"


def list_of_files(folder):
    write_video(folder / "b.mp4", stamps=range(2))
    (folder / "a.mp4").write_text("ffconcat version 1.0\nfile b.mp4\n")
    return folder / "a.mp4", "is text, not a video"


def noise(folder):
    (folder / "a.mkv").write_bytes(torch.randint(0, 256, (9000,), dtype=torch.uint8).numpy())
    return folder / "a.mkv", "cannot be read: Invalid data found when processing input"


def subtitles(folder):
    (folder / "a.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nhello\n")
    return folder / "a.srt", "has no video stream"


def pipe(folder):
    os.mkfifo(folder / "a.mp4")
    return folder / "a.mp4", "is neither a file nor a folder"


@pytest.mark.parametrize(
    "case",
    [
        no_file,
        empty_file,
        text_named_video,
        text_that_ffmpeg_draws,
        list_of_files,
        noise,
        subtitles,
        pipe,
    ],
)
def test_path_errors(case, tmp_path, capfd):
    path, reason = case(tmp_path)
    capfd.readouterr()
    with pytest.raises(ClipError, match=rf"^{path}: {reason}$"):
        read_clip(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
def test_truncated_video(tmp_path, suffix):
    encoder = {".avi": "mpeg4", ".webm": "libvpx-vp9"}.get(suffix, "libx264")
    path = write_video(tmp_path / f"a{suffix}", encoder, {"g": "5"})
    clean = read_clip(path, 8, 32, end=0.5)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert torch.equal(read_clip(path, 8, 32, end=0.5), clean)
    reason = r"is truncated: it has only [0-9.]+ of [0-9.]+ (frames|s); download it again"
    with pytest.raises(ClipError, match=rf"^{path}: {reason}$"):
        read_clip(path, 1)


def test_edit_list_hides_all_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", "libx264", {"g": "12"}, range(-9, 0))
    with pytest.raises(ClipError, match=rf"^{path}: no frame of its video stream can be decoded$"):
        read_clip(path)
