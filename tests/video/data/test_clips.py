"""Frames are chosen, resized, turned upright and coloured as documented; what is not, raises."""

import struct

import av
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media import RATE, write_video

from tokenmix_ops.video.data.clips import (
    CLIP_MEAN,
    CLIP_STD,
    ClipError,
    frame_indices,
    normalize_clip,
    read_clip,
)

pytestmark = pytest.mark.interfaces


@given(n=st.integers(1, 300), k=st.integers(1, 40), seed=st.integers(0, 99))
def test_frame_indices(n, k, seed):
    uniform = frame_indices(n, k)
    assert uniform == [i * n // k for i in range(k)]
    drawn = frame_indices(n, k, "random", torch.Generator().manual_seed(seed))
    assert drawn == frame_indices(n, k, "random", torch.Generator().manual_seed(seed))
    if n < k:
        assert drawn == uniform
        assert set(drawn) == set(range(n))
    else:
        assert len(set(drawn)) == k
        assert drawn == sorted(drawn)
        assert 0 <= drawn[0] <= drawn[-1] < n


def test_random_indices_reach_every_frame():
    generator = torch.Generator().manual_seed(3)
    seen = {i for _ in range(100) for i in frame_indices(20, 2, "random", generator)}
    assert seen == set(range(20))


def test_size_is_square_or_height_and_width(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    assert read_clip(path, 2, 40).shape == (2, 3, 40, 40)
    clip = read_clip(str(path), 2, (16, 24))
    assert clip.shape == (2, 3, 16, 24)
    assert clip.min() >= 0
    assert clip.max() <= 1


# The matrix in an mp4's track header: a b u, c d v, x y w.
ROTATIONS = {0: (1, 0, 0, 1), 1: (0, -1, 1, 0), 2: (-1, 0, 0, -1), 3: (0, 1, -1, 0)}


@pytest.mark.parametrize("quarters", ROTATIONS)
def test_rotation(tmp_path, quarters):
    def matrix(a, b, c, d):
        return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)

    path = write_video(tmp_path / "a.mp4", stamps=range(3), width=96, height=64)
    upright = read_clip(path, 3, (64, 96))
    data = path.read_bytes()
    at = data.index(matrix(1, 0, 0, 1), data.index(b"tkhd"))
    path.write_bytes(data[:at] + matrix(*ROTATIONS[quarters]) + data[at + 36 :])
    turned = read_clip(path, 3, (96, 64) if quarters % 2 else (64, 96))
    assert torch.equal(turned, upright.rot90(quarters, (2, 3)))


def test_frames_have_8_bits_a_channel(tmp_path):
    clip = read_clip(write_video(tmp_path / "a.mp4"), 3, (30, 50))
    levels = (clip * 255).round()
    assert torch.equal(levels / 255, clip)
    assert len(levels.unique()) > 100


COLOURS = {
    "red": (200, 60, 30),
    "green": (20, 180, 90),
    "grey": (128, 128, 128),
    "white": (255,) * 3,
}
# AVColorSpace to (red, blue) weights; 2 is "unspecified", for which BT.601 is the convention.
WEIGHTS = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("depth", [8, 10])
def test_colour(tmp_path, colour, matrix, full_range, depth):
    red, blue = WEIGHTS[matrix]
    r, g, b = (c / 255 for c in COLOURS[colour])
    y = red * r + (1 - red - blue) * g + blue * b
    planes = (y, (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red))
    top, unit = (1 << depth) - 1, 1 << (depth - 8)
    scale = (top, top, top) if full_range else (219 * unit, 224 * unit, 224 * unit)
    shift = (0 if full_range else 16 * unit, 128 * unit, 128 * unit)
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"qp": "4"})
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuv420p" if depth == 8 else "yuv420p10le"
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = 2 if full_range else 1
        frame = av.VideoFrame(64, 48, stream.pix_fmt)
        for plane, value, s, z in zip(frame.planes, planes, scale, shift, strict=True):
            level = min(round(value * s + z), top)
            plane.update(
                level.to_bytes(unit // 2 or 1, "little") * (plane.buffer_size // (unit // 2 or 1))
            )
        frame.colorspace, frame.color_range = matrix, 2 if full_range else 1
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    got = read_clip(path, 1, 16) * 255
    assert (got - torch.tensor(COLOURS[colour]).view(3, 1, 1)).abs().max() <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames must be an integer of at least 1, got 0"),
        ({"sampling": "first"}, "sampling must be 'uniform' or 'random', got 'first'"),
        ({"size": 0}, r"size must be an int or \(height, width\), each at least 1, got 0"),
        ({"size": (8, -1)}, r"size must be .*, got \(8, -1\)"),
        ({"size": (8, 8, 8)}, r"size must be .*, got \(8, 8, 8\)"),
        ({"start": -1.0}, "start must be at least 0 seconds, got -1.0"),
        ({"start": float("nan")}, "start must be at least 0 seconds, got nan"),
        ({"start": 2, "end": 2}, "end must be in seconds and above start = 2, got 2"),
        ({"end": 0}, "end must be in seconds and above start = 0, got 0"),
        ({"end": float("nan")}, "end must be .*, got nan"),
        ({"fps": 0}, "fps must be above 0 and finite, got 0"),
        ({"fps": -4.0}, "fps must be .*, got -4.0"),
        ({"fps": float("nan")}, "fps must be .*, got nan"),
        ({"fps": float("inf")}, "fps must be .*, got inf"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_clip("nowhere.mp4", **arguments)
    assert not isinstance(caught.value, ClipError)


def test_integers_are_not_normalised():
    with pytest.raises(ValueError, match=r"floating point in \[0, 1\], got torch.uint8"):
        normalize_clip(torch.zeros(3, 4, 4, dtype=torch.uint8))


def test_available_count_error():
    with pytest.raises(ValueError, match="num_available must be an integer of at least 1, got 0"):
        frame_indices(0, 1)


def test_normalize_clip():
    clip = torch.rand(2, 4, 3, 5, 6)
    wanted = clip.clone()
    for c in range(3):
        wanted[:, :, c] = (clip[:, :, c] - CLIP_MEAN[c]) / CLIP_STD[c]
    torch.testing.assert_close(normalize_clip(clip), wanted)
    assert normalize_clip(clip.double()).dtype == torch.float64
    with pytest.raises(
        ValueError, match=r"expected clip \[\.\.\., 3, height, width\], got \[2, 4, 5, 6\]"
    ):
        normalize_clip(torch.rand(2, 4, 5, 6))
