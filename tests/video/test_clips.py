"""Clips equal what decoding every frame in order and picking gives, or raise naming the path."""

import os
import struct
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path

import av
import pytest
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmix_ops.video.data import clips
from tokenmix_ops.video.data.clips import (
    CLIP_MEAN,
    CLIP_STD,
    ClipError,
    frame_indices,
    normalize_clip,
    read_clip,
)

RATE = 10
LENGTH = 45
SIZE = (24, 32)
# libx265 4.2 writes outside its buffers on pictures of 48x32.
SIDE = 64

# name: (file suffix, encoder, options, read by timestamp rather than by counting)
ENCODINGS = {
    "h264": (".mp4", "libx264", {"g": "12"}, True),
    "h264-one-gop": (".mp4", "libx264", {"g": "250"}, True),
    "h264-intra": (".mp4", "libx264", {"g": "1"}, True),
    "h264-gop-shorter-than-reorder": (".mp4", "libx264", {"g": "3", "bf": "2"}, True),
    "h264-no-b": (".mkv", "libx264", {"g": "12", "bf": "0"}, True),
    "h264-open-gop": (".mkv", "libx264", {"x264-params": "keyint=12:open-gop=1"}, True),
    "h264-open-gop-ts": (".ts", "libx264", {"x264-params": "keyint=12:open-gop=1"}, True),
    "h264-interlaced": (".mp4", "libx264", {"x264-params": "keyint=12:tff=1"}, True),
    "h264-intra-refresh": (".mp4", "libx264", {"x264-params": "keyint=12:intra-refresh=1"}, None),
    "h264-elementary": (".h264", "libx264", {"g": "12"}, False),
    "h264-ts": (".ts", "libx264", {"g": "12"}, True),
    "h264-flv": (".flv", "libx264", {"g": "12"}, True),
    "h264-fragments": (".mp4", "libx264", {"g": "12"}, True),
    "h265": (".mp4", "libx265", {"x265-params": "keyint=12:open-gop=1:log-level=none"}, True),
    "h265-mkv": (".mkv", "libx265", {"x265-params": "keyint=12:open-gop=0:log-level=none"}, True),
    "av1": (".mp4", "libsvtav1", {"g": "12", "preset": "12"}, True),
    "av1-mkv": (".mkv", "libsvtav1", {"g": "12", "preset": "12"}, True),
    "mpeg4-avi": (".avi", "mpeg4", {"g": "12"}, True),
    "mpeg4-avi-b": (".avi", "mpeg4", {"g": "12", "bf": "2"}, True),
    "mpeg4-mp4": (".mp4", "mpeg4", {"g": "12", "bf": "2"}, True),
    "mpeg2-ts": (".ts", "mpeg2video", {"g": "12", "bf": "2"}, False),
    "vp8": (".webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}, False),
    "vp9": (".webm", "libvpx-vp9", {"g": "12", "cpu-used": "8", "lag-in-frames": "16"}, True),
    "ffv1": (".mkv", "ffv1", {}, True),
    "mjpeg": (".avi", "mjpeg", {}, True),
    "h264-10-bit": (".mkv", "libx264", {"g": "12"}, True),
}


def picture(i: int, height: int, width: int) -> torch.Tensor:
    """Blocks that move, so that every frame differs from every other."""
    blocks = torch.randint(
        0, 256, (height // 8 + 1, width // 8 + 1, 3), generator=torch.Generator().manual_seed(0)
    )
    image = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)[:height, :width]
    image = image.roll((i, 3 * i), (0, 1))
    image[..., i % 3] //= 2
    return image.to(torch.uint8)


def rgb_frame(image: torch.Tensor, pts: int = 0) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(image.contiguous().numpy(), format="rgb24")
    frame.pts, frame.time_base = pts, Fraction(1, RATE)
    return frame


def encode(container, encoder, options, stamps, width, height, pix_fmt="yuv420p"):
    stream = container.add_stream(encoder, rate=RATE, options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
    stream.codec_context.thread_count = 1
    stream.codec_context.time_base = Fraction(1, RATE)
    packets = []
    for i, pts in enumerate(stamps):
        packets += stream.encode(rgb_frame(picture(i, height, width), pts))
    return stream, packets + stream.encode()


def write_video(
    path: Path,
    encoder: str = "libx264",
    options: dict[str, str] | None = None,
    stamps=range(LENGTH),
    width: int = SIDE,
    height: int = SIDE,
    pix_fmt: str = "yuv420p",
    skip: int = 0,
    movflags: str = "faststart",
) -> Path:
    container_options = {"movflags": movflags} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=container_options) as container:
        _, packets = encode(container, encoder, options or {}, stamps, width, height, pix_fmt)
        for packet in packets[skip:]:
            container.mux(packet)
    return path


@cache
def decode_all(path: Path, size=SIZE) -> tuple[list[float | None], torch.Tensor]:
    """Times in seconds after the first frame, and all frames, decoded in order."""
    with av.open(str(path)) as container:
        stream = next(
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        )
        frames = [
            (f.pts, clips._to_image(f, size, VideoReformatter())) for f in container.decode(stream)
        ]
        base = stream.time_base
    stamps = [pts for pts, _ in frames]
    if None in stamps:
        return [None] * len(stamps), torch.stack([image for _, image in frames])
    times = [float((pts - min(stamps)) * base) for pts in stamps]
    return times, torch.stack([image for _, image in frames])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def naive(path: Path, num_frames, sampling="uniform", start=None, end=None, size=SIZE):
    times, images = decode_all(path, size)
    window = list(range(len(times)))
    if start is not None or end is not None:
        high = float("inf") if end is None else end
        window = [i for i in window if (start or 0) <= times[i] < high]
    if not window:
        return None
    chosen = frame_indices(len(window), num_frames, sampling, seeded())
    return images[[window[i] for i in chosen]]


def assert_same(clip: torch.Tensor, wanted: torch.Tensor) -> None:
    assert clip.dtype == torch.float32
    assert torch.equal(clip, wanted)


def assert_all_same(path: Path) -> None:
    for num_frames, sampling in product((1, 2, 7, LENGTH, 60), ("uniform", "random")):
        clip = read_clip(path, num_frames, SIZE, sampling, generator=seeded())
        assert_same(clip, naive(path, num_frames, sampling))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")

    @cache
    def make(name: str) -> Path:
        suffix, encoder, options, _ = ENCODINGS[name]
        return write_video(
            folder / f"{name}{suffix}",
            encoder,
            options,
            movflags="frag_keyframe+empty_moov" if "fragments" in name else "faststart",
            pix_fmt={"mjpeg": "yuvj420p", "h264-10-bit": "yuv420p10le"}.get(name, "yuv420p"),
        )

    return make


@pytest.fixture
def counted(monkeypatch):
    """Paths that were read by counting decoded frames."""
    paths = []
    count = clips._count_frames
    monkeypatch.setattr(clips, "_count_frames", lambda path: paths.append(path) or count(path))
    return paths


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
    generator = seeded()
    seen = {i for _ in range(100) for i in frame_indices(20, 2, "random", generator)}
    assert seen == set(range(20))


# 0 seeks to every keyframe that it can.
@pytest.mark.parametrize("reorder", [0, clips._MAX_REORDER])
@pytest.mark.parametrize("name", ENCODINGS)
def test_equals_full_decode(name, reorder, videos, counted, monkeypatch):
    monkeypatch.setattr(clips, "_MAX_REORDER", reorder)
    assert_all_same(videos(name))
    by_timestamp = ENCODINGS[name][3]
    assert by_timestamp is None or (not counted) == by_timestamp


tenths = st.none() | st.integers(0, 2 * LENGTH).map(lambda i: i / (2 * RATE))


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from([n for n in ENCODINGS if "elementary" not in n]),
    start=tenths,
    end=tenths,
    num_frames=st.integers(1, 20),
    sampling=st.sampled_from(["uniform", "random"]),
)
def test_spans_equal_full_decode(videos, name, start, end, num_frames, sampling):
    if end is not None and end <= (start or 0):
        with pytest.raises(ValueError, match=rf"end is {end}, .* more than start, {start or 0}"):
            read_clip("nowhere", start=start, end=end)
        return
    path = videos(name)
    wanted = naive(path, num_frames, sampling, start, end)
    arguments = (path, num_frames, SIZE, sampling, start, end, seeded())
    if wanted is None:
        with pytest.raises(ClipError, match=rf"{path}: no frame has its time in \[{start or 0.0}"):
            read_clip(*arguments)
    else:
        assert_same(read_clip(*arguments), wanted)


@settings(max_examples=12, deadline=None)
@given(
    gop=st.integers(1, 20),
    b_frames=st.integers(0, 4),
    gaps=st.lists(st.integers(1, 5), min_size=20, max_size=40),
    first=st.integers(-6, 30),
    suffix=st.sampled_from([".mp4", ".mkv", ".ts"]),
)
def test_any_timing_equals_full_decode(tmp_path_factory, gop, b_frames, gaps, first, suffix):
    """Variable rates, any first timestamp, and edit lists that hide the frames before zero."""
    stamps = [first + sum(gaps[:i]) for i in range(len(gaps))]
    options = {"g": str(gop), "bf": str(b_frames)}
    path = tmp_path_factory.mktemp("timing") / f"clip{suffix}"
    assert_all_same(write_video(path, "libx264", options, stamps))


@pytest.mark.parametrize("encoder", ["mpeg4", "mjpeg"])
def test_gaps_that_avi_counts_as_frames(tmp_path, encoder, counted):
    stamps = [0, 1, 2, 7, 8, 20, 21, 22, 23, 24, 30, 31, 50]
    pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / "a.avi", encoder, {"g": "4"}, stamps, pix_fmt=pix_fmt)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > len(stamps)
    assert_all_same(path)
    assert not counted


def test_edit_list_hides_frames(tmp_path, counted):
    path = write_video(tmp_path / "a.mp4", "libx264", {"g": "12"}, range(-5, 30))
    with av.open(str(path)) as container:
        assert any(packet.is_discard for packet in container.demux(video=0))
    assert len(decode_all(path)[0]) == 30
    assert_all_same(path)
    assert not counted


@pytest.mark.parametrize("suffix", [".ts", ".mkv"])
@pytest.mark.parametrize("encoder", ["libx264", "libx265", "mpeg4"])
@pytest.mark.parametrize("skip", [1, 3, 12, 14])
def test_recording_that_begins_between_keyframes(tmp_path, suffix, encoder, skip):
    options = {"libx265": {"x265-params": "keyint=12:open-gop=1:log-level=none"}}
    options = options.get(encoder, {"g": "12", "bf": "2"})
    assert_all_same(write_video(tmp_path / f"a{suffix}", encoder, options, skip=skip))


@pytest.mark.parametrize(("suffix", "encoder"), [(".mp4", "libx264"), (".avi", "mpeg4")])
def test_odd_size(tmp_path, suffix, encoder):
    path = write_video(
        tmp_path / f"a{suffix}",
        encoder,
        {"g": "5"},
        range(9),
        113,
        67,
        "yuv444p" if encoder == "libx264" else "yuv420p",
    )
    clip = read_clip(path, 9, (67, 113))
    wanted = torch.stack([picture(i, 67, 113) for i in range(9)]).permute(0, 3, 1, 2) / 255
    assert (clip - wanted).abs().mean() < 0.15
    assert_same(clip, naive(path, 9, size=(67, 113)))


def test_size_is_square_or_height_and_width(videos):
    assert read_clip(videos("h264"), 2, 40).shape == (2, 3, 40, 40)
    clip = read_clip(str(videos("h264")), 2, (16, 24))
    assert clip.shape == (2, 3, 16, 24)
    assert clip.min() >= 0
    assert clip.max() <= 1


def test_default_generator_is_the_global_one(videos):
    torch.manual_seed(5)
    drawn = frame_indices(LENGTH, 8, "random")
    for name in ("h264", "vp8"):
        torch.manual_seed(5)
        clip = read_clip(videos(name), 8, SIZE, "random")
        assert_same(clip, decode_all(videos(name), SIZE)[1][drawn])


def test_surprise_does_not_change_the_draw(videos, monkeypatch, counted):
    def surprised(*arguments):
        raise clips._Surprise

    monkeypatch.setattr(clips, "_seek", surprised)
    clip = read_clip(videos("h264"), 8, SIZE, "random", generator=seeded())
    assert counted
    assert_same(clip, naive(videos("h264"), 8, "random"))


def write_streams(path: Path, *streams: tuple[str, int, int, int]) -> Path:
    """Streams of (encoder, side, number of frames, disposition)."""
    with av.open(str(path), "w") as container:
        opened = []
        for encoder, side, length, disposition in streams:
            stream = container.add_stream(encoder, rate=RATE)
            stream.width = stream.height = side
            stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
            stream.disposition = disposition
            opened.append((stream, side, length))
        for stream, side, length in opened:
            for i in range(length):
                container.mux(stream.encode(rgb_frame(picture(i, side, side), i)))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("default", "length"), [(0, 6), (Disposition.default, 5)])
def test_reads_the_default_stream_then_the_largest(tmp_path, default, length):
    path = write_streams(tmp_path / "a.mkv", ("libx264", 64, 5, default), ("libx264", 128, 6, 0))
    alone = write_streams(tmp_path / "b.mkv", ("libx264", (64, 128)[length - 5], length, 0))
    assert_same(read_clip(path, length, SIZE), naive(alone, length))


def test_cover_art_is_no_video(tmp_path):
    cover = ("mjpeg", 128, 1, Disposition.attached_pic)
    path = write_streams(tmp_path / "a.mp4", cover, ("libx264", 64, 5, 0))
    assert_same(read_clip(path, 5, SIZE), naive(path, 5))
    only = write_streams(tmp_path / "b.mp4", cover)
    with pytest.raises(ClipError, match=rf"^{only}: has no video stream$"):
        read_clip(only)


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
    assert_same(turned, upright.rot90(quarters, (2, 3)))


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


def write_image(path: Path, image: torch.Tensor) -> torch.Tensor:
    height, width, _ = image.shape
    png = path.suffix.lower() == ".png"
    encoder = av.CodecContext.create("png" if png else "mjpeg", "w")
    encoder.width, encoder.height, encoder.time_base = width, height, Fraction(1, RATE)
    encoder.pix_fmt = "rgb24" if png else "yuvj444p"
    frame = rgb_frame(image).reformat(format=encoder.pix_fmt, dst_color_range="JPEG")
    path.write_bytes(b"".join(bytes(p) for p in encoder.encode(frame) + encoder.encode(None)))
    return image.permute(2, 0, 1) / 255


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG"])
def test_folder_is_ordered_by_number(tmp_path, suffix):
    folder = tmp_path / "100%d video7"
    folder.mkdir()
    for name in ("notes.txt", ".hidden1.jpg", "._frame3.png"):
        (folder / name).write_text("not an image")
    numbers = [2, 10, 11, 100]
    images = [
        write_image(folder / f"clip9_frame{n}{suffix}", picture(n, 40 + n % 3, 56)) for n in numbers
    ]
    resized = torch.cat(
        [
            torch.nn.functional.interpolate(i[None], SIZE, mode="bicubic", antialias=True).clamp(
                0, 1
            )
            for i in images
        ]
    )
    close = {"rtol": 0, "atol": 0 if suffix == ".png" else 0.2}
    torch.testing.assert_close(read_clip(folder, 4, SIZE), resized, **close)
    torch.testing.assert_close(read_clip(folder, 2, SIZE), resized[[0, 2]], **close)
    torch.testing.assert_close(read_clip(folder, 6, SIZE), resized[[0, 0, 1, 2, 2, 3]], **close)
    drawn = frame_indices(4, 2, "random", seeded())
    clip = read_clip(folder, 2, SIZE, "random", generator=seeded())
    torch.testing.assert_close(clip, resized[drawn], **close)


def test_jpeg_orientation(tmp_path):
    path = tmp_path / "1.jpg"
    write_image(path, picture(1, 32, 48))
    plain = read_clip(tmp_path, 1, (32, 48))
    # Orientation 6: turn clockwise by a quarter.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIII", 0x112, 3, 1, 6, 0)
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
    assert_same(read_clip(tmp_path, 1, (48, 32)), plain.rot90(-1, (2, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0, it must be at least 1"),
        ({"sampling": "first"}, "sampling is 'first', it must be 'uniform' or 'random'"),
        ({"size": 0}, r"size is 0, it must be an int or \(height, width\), each at least 1"),
        ({"size": (8, -1)}, r"size is \(8, -1\), it must be"),
        ({"size": (8, 8, 8)}, r"size is \(8, 8, 8\), it must be"),
        ({"start": -1.0}, "start is -1.0, it must be in seconds, 0 or more"),
        ({"start": float("nan")}, "start is nan, it must be in seconds"),
        ({"start": 2, "end": 2}, "end is 2, it must be in seconds, more than start, 2"),
        ({"end": 0}, "end is 0, it must be in seconds, more than start, 0"),
        ({"end": float("nan")}, "end is nan, it must be in seconds"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_clip("nowhere.mp4", **arguments)
    assert not isinstance(caught.value, ClipError)


def test_available_count_error():
    with pytest.raises(ValueError, match="num_available is 0, it must be at least 1"):
        frame_indices(0, 1)


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


def empty_folder(folder):
    (folder / "notes.txt").touch()
    return folder, r"has no numbered .jpg, .jpeg or .png images"


def image_without_number(folder):
    write_image(folder / "1.png", picture(1, 16, 16))
    write_image(folder / "cover.png", picture(1, 16, 16))
    return folder / "cover.png", "has no number in its name to order it by; rename or move it"


def images_of_one_number(folder):
    write_image(folder / "frame1.png", picture(1, 16, 16))
    write_image(folder / "frame01.png", picture(1, 16, 16))
    return folder / "frame1.png", "has the same number as frame01.png; remove one of them"


def text_named_image(folder):
    (folder / "1.jpg").write_text("hello")
    return folder / "1.jpg", "is not a JPEG or PNG image"


def empty_image(folder):
    (folder / "1.png").touch()
    return folder / "1.png", "is not a JPEG or PNG image"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
def test_truncated_video(tmp_path, suffix):
    encoder = {".avi": "mpeg4", ".webm": "libvpx-vp9"}.get(suffix, "libx264")
    path = write_video(tmp_path / f"a{suffix}", encoder, {"g": "5"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reason = r"is truncated, only [0-9.]+ of [0-9.]+ (frames|s) are there; fetch it again"
    with pytest.raises(ClipError, match=rf"^{path}: {reason}$"):
        read_clip(path, 1)


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
        empty_folder,
        image_without_number,
        images_of_one_number,
        text_named_image,
        empty_image,
    ],
)
def test_path_errors(case, tmp_path, capfd):
    folder = tmp_path / "clip"
    folder.mkdir()
    path, reason = case(folder)
    capfd.readouterr()
    with pytest.raises(ClipError, match=rf"^{path}: {reason}$"):
        read_clip(folder if path.parent == folder and case.__name__.count("image") else path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.8])
def test_truncated_image(tmp_path, suffix, kept):
    for i in range(3):
        write_image(tmp_path / f"{i}{suffix}", picture(i, 64, 64))
    path = tmp_path / f"1{suffix}"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ClipError, match=rf"^{path}: is damaged"):
        read_clip(tmp_path, 3)
    assert read_clip(tmp_path, 1).shape[0] == 1


def test_folder_has_no_clock(tmp_path):
    write_image(tmp_path / "1.png", picture(1, 16, 16))
    with pytest.raises(ClipError, match=rf"^{tmp_path}: a folder of images has no clock"):
        read_clip(tmp_path, end=2.0)


def test_stream_without_timestamps_has_no_clock(videos):
    path = videos("h264-elementary")
    with pytest.raises(ClipError, match=rf"^{path}: start and end need timestamps, .*; remux it"):
        read_clip(path, start=1.0)


@pytest.mark.parametrize("name", ["h264", "mpeg4-avi", "vp8"])
def test_start_beyond_the_end(name, videos):
    path = videos(name)
    reason = rf"no frame has its time in \[30, inf\) s; its {LENGTH} frames are at 0 to 4.400 s"
    with pytest.raises(ClipError, match=rf"^{path}: {reason}$"):
        read_clip(path, start=30)


@pytest.mark.parametrize("name", ["h264", "h264-no-b", "h265", "av1", "mpeg4-avi", "mpeg4-mp4"])
def test_damage_raises_only_where_it_is_needed(name, videos, tmp_path, capfd):
    """One packet is overwritten, in one group of pictures of four."""
    source = videos(name)
    path = tmp_path / source.name
    with av.open(str(source)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    keys = [i for i, p in enumerate(packets) if p.is_keyframe]
    victim = packets[keys[2] + 1]
    data = bytearray(source.read_bytes())
    at = data.index(bytes(victim))
    data[at : at + victim.size] = b"\xa5" * victim.size
    path.write_bytes(data)
    clean = decode_all(source)[1]
    for end in (0.5, 1.0, 2.0):
        assert_same(read_clip(path, 4, SIZE, end=end), naive(source, 4, end=end))
    with pytest.raises(ClipError, match=rf"^{path}: frame [0-9]+ of .* depends on damaged data; "):
        read_clip(path, len(clean), SIZE)
    assert capfd.readouterr() == ("", "")


def test_normalize_clip():
    clip = torch.rand(2, 4, 3, 5, 6)
    wanted = clip.clone()
    for c in range(3):
        wanted[:, :, c] = (clip[:, :, c] - CLIP_MEAN[c]) / CLIP_STD[c]
    torch.testing.assert_close(normalize_clip(clip), wanted)
    assert normalize_clip(clip.double()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"clip has shape \(2, 4, 5, 6\), it must be"):
        normalize_clip(torch.rand(2, 4, 5, 6))
