"""Files damaged at every position of a coarse grid: the clip, or an error, and no flat frames."""

import random

import av
import pytest
import torch
from media import picture, write_image, write_video

from tokenmix_ops.video.data.checking import Check, examine
from tokenmix_ops.video.data.clips import ClipError, read_clip
from tokenmix_ops.video.data.manifest import Video

LENGTH, SIZE = 30, 32
# Frames of these clips have contrasts four times as strong.
FLAT = 0.05
ENCODINGS = {
    "a.mp4": ("libx264", {"g": "12"}),
    "b.mp4": ("mpeg4", {"g": "12", "bf": "2"}),
    "a.avi": ("mpeg4", {"g": "12"}),
    "a.mkv": ("libx264", {"g": "12", "bf": "0"}),
}


def flip(data, at, rng):
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def zeros(data, at, rng):
    return data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :]


def noise(data, at, rng):
    return data[:at] + rng.randbytes(len(data[at : at + 512])) + data[at + 512 :]


def cut(data, at, rng):
    return data[:at]


def hole(data, at, rng):
    return data[:at] + data[at + 200 :]


def echo(data, at, rng):
    return data[: at + 200] + data[at:]


def positions(size):
    """A grid, closer at both ends, where the headers are."""
    ends = (0, 16, 64, 256, 1024)
    grid = (i * size // 9 for i in range(9))
    return sorted({*ends, *(size - 1 - end for end in ends), *grid})


def clips_of(path, damage):
    """Clips of the file damaged in turn at each position; None where reading raises."""
    data = path.read_bytes()
    for at in positions(len(data)):
        path.write_bytes(damage(data, at, random.Random(at)))
        try:
            yield at, read_clip(path, 8, SIZE)
        except ClipError:
            yield at, None
    path.write_bytes(data)


def contrast(clip):
    """Standard deviation within the flattest frame."""
    return clip.flatten(2).std(2).mean(1).min()


@pytest.mark.parametrize("damage", [flip, zeros, noise, cut, hole, echo])
@pytest.mark.parametrize("name", ENCODINGS)
def test_damage_gives_a_clip_or_an_error(name, damage, tmp_path, capfd):
    path = write_video(tmp_path / name, *ENCODINGS[name], range(LENGTH))
    clean = read_clip(path, 8, SIZE)
    assert contrast(clean) > 3 * FLAT
    capfd.readouterr()
    outcomes = {at: clip for at, clip in clips_of(path, damage)}
    # Matroska skips what it has read before.
    assert damage is echo or None in outcomes.values()
    assert [at for at, clip in outcomes.items() if clip is not None and contrast(clip) < FLAT] == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a.mp4", "b.mp4", "a.avi"])
def test_cut_file_never_passes_for_a_shorter_one(name, tmp_path):
    path = write_video(tmp_path / name, *ENCODINGS[name], range(LENGTH))
    clean = read_clip(path, 8, SIZE)
    for _, clip in clips_of(path, cut):
        assert clip is None or torch.equal(clip, clean)


def test_avi_that_lost_frames_in_the_middle_raises(tmp_path):
    path = write_video(tmp_path / "a.avi", "mpeg4", {"g": "12"}, range(LENGTH))
    with av.open(str(path)) as container:
        victim = [p for p in container.demux(video=0) if p.size][15]
    data = bytearray(path.read_bytes())
    # The name of its chunk, after which its length.
    at = data.index(bytes(victim)) - 8
    assert data[at : at + 4] == b"00dc"
    data[at : at + 4] = b"\1\2\3\4"
    path.write_bytes(data)
    with pytest.raises(
        ClipError, match=rf"^{path}: is truncated: it has only [0-9]+ of {LENGTH} frames"
    ):
        read_clip(path, 8, SIZE)


@pytest.mark.interfaces
def test_rejected_packet_does_not_move_the_frames_after_it(tmp_path):
    """The decoder still gives out a frame of some packets that it rejects."""
    path = write_video(tmp_path / "a.mp4", "mpeg4", {"g": "10"}, range(LENGTH))
    clean = read_clip(path, 3, SIZE)
    with av.open(str(path)) as container:
        victim = [p for p in container.demux(video=0) if p.size][5]
    source = path.read_bytes()
    moved = 0
    for at in range(victim.pos + 8, victim.pos + victim.size, 16):
        data = bytearray(source)
        data[at : at + 16] = b"\xa5" * 16
        path.write_bytes(data)
        assert torch.equal(read_clip(path, 3, SIZE), clean)
        with pytest.raises(ClipError, match=rf"^{path}: frame 5 of {LENGTH} depends on damaged"):
            read_clip(path, LENGTH, SIZE)
        moved += 1
    assert moved


@pytest.mark.interfaces
def test_png_checksum(tmp_path):
    image = picture(0, 40, 48)
    write_image(tmp_path / "0.png", image)
    data = (tmp_path / "0.png").read_bytes()
    for at in range(40, len(data) - 16, max(1, len(data) // 40)):
        (tmp_path / "0.png").write_bytes(flip(data, at, random.Random(at)))
        task = Check(Video(".", "a", (), "test"), tmp_path, 1, SIZE, False)
        assert examine(task).status == "unreadable"
