"""Clips equal what decoding every frame in order and picking gives, or raise naming the path."""

from fractions import Fraction
from functools import cache
from itertools import dropwhile, product
from pathlib import Path

import av
import pytest
import torch
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st
from media import RATE, SIDE, encode, picture, write_streams, write_video

from tokenmix_ops.video.data import clips, video_file
from tokenmix_ops.video.data.clips import ClipError, frame_indices, read_clip

pytestmark = pytest.mark.interfaces

LENGTH = 45
SIZE = (24, 32)
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
    "h264-asf": (".asf", "libx264", {"g": "12"}, False),
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


def with_a_keyframe(codec, frames):
    """Without what FFmpeg's MPEG-4 decoder draws on grey before the first keyframe."""
    return dropwhile(lambda f: not f.key_frame, frames) if codec == "mpeg4" else frames


@cache
def decode_all(path: Path, size=SIZE) -> tuple[list[float | None], torch.Tensor]:
    """Times in seconds after the first frame, and all frames, decoded in order."""
    with av.open(str(path)) as container:
        stream = next(
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        )
        frames = [
            (f.pts, clips.to_floats(clips._Resizer(size)(f)))
            for f in with_a_keyframe(stream.codec_context.name, container.decode(stream))
        ]
        base = stream.time_base
    stamps = [pts for pts, _ in frames]
    if None in stamps:
        return [None] * len(stamps), torch.stack([image for _, image in frames])
    times = [float((pts - min(stamps)) * base) for pts in stamps]
    return times, torch.stack([image for _, image in frames])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def first_of_each_step(window, times, start, fps):
    """By the definition: for every k, the first frame at or after start + k / fps."""
    chosen = []
    for k in range(int((times[-1] - start + 1) * fps) + 1):
        # To a millisecond.
        late = [i for i in window if times[i] + 1e-3 >= start + k / fps]
        chosen += [i for i in late[:1] if i not in chosen]
    return chosen


def naive(path: Path, num_frames, sampling="uniform", start=None, end=None, fps=None, size=SIZE):
    times, images = decode_all(path, size)
    window = list(range(len(times)))
    if start is not None or end is not None:
        high = float("inf") if end is None else end
        window = [i for i in window if (start or 0) <= times[i] < high]
    if not window:
        return None
    if fps is not None:
        window = first_of_each_step(window, times, start or 0, fps)
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
    count = video_file._count_frames
    monkeypatch.setattr(
        video_file, "_count_frames", lambda path, *a: paths.append(path) or count(path, *a)
    )
    return paths


# 0 seeks to every keyframe that it can.
@pytest.mark.parametrize("reorder", [0, video_file._MAX_REORDER])
@pytest.mark.parametrize("name", ENCODINGS)
def test_equals_full_decode(name, reorder, videos, counted, monkeypatch):
    monkeypatch.setattr(video_file, "_MAX_REORDER", reorder)
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
    fps=st.sampled_from([None, 0.3, 1, 3, 4.0, 7.5, 10, 29.97]),
)
def test_spans_and_rates_equal_full_decode(videos, name, start, end, num_frames, sampling, fps):
    if end is not None and end <= (start or 0):
        with pytest.raises(
            ValueError, match=rf"end must be .* above start = {start or 0}, got {end}"
        ):
            read_clip("nowhere", start=start, end=end)
        return
    path = videos(name)
    wanted = naive(path, num_frames, sampling, start, end, fps)
    arguments = (path, num_frames, SIZE, sampling, start, end, seeded(), fps)
    if wanted is None:
        with pytest.raises(ClipError, match=rf"{path}: expected frames in \[{start or 0.0}"):
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


def packets_of(path):
    with av.open(str(path)) as container:
        return [p for p in container.demux(video=0) if p.size]


def test_short_span_in_a_long_group_of_pictures_is_read_by_timestamp(tmp_path, counted):
    options = {"x264-params": "keyint=24:bframes=8:b-adapt=0:b-pyramid=normal"}
    path = write_video(tmp_path / "a.mp4", "libx264", options)
    for end in range(1, LENGTH):
        span = {"start": (end - 1) / RATE, "end": end / RATE}
        assert_same(read_clip(path, 1, SIZE, **span), naive(path, 1, **span))
    assert not counted


def test_repeated_timestamps(tmp_path, counted):
    """Matroska counts in milliseconds, whatever the rate."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        _, packets = encode(container, "libx264", {"bf": "0"}, range(LENGTH), SIDE, SIDE)
        for packet in packets:
            packet.time_base = Fraction(1, 4000)
            container.mux(packet)
    assert len({packet.pts for packet in packets_of(path)}) < LENGTH
    assert_all_same(path)
    assert counted


def test_last_packet_is_filler(tmp_path):
    options = {"x265-params": "keyint=12:bframes=0:log-level=none"}
    path = write_video(tmp_path / "a.mp4", "libx265", options)
    last = packets_of(path)[-1]
    data = bytearray(path.read_bytes())
    # The type of the one unit in the packet, after its length.
    data[last.pos + 4] = 38 << 1
    path.write_bytes(data)
    assert len(decode_all(path)[0]) == LENGTH - 1
    assert_same(read_clip(path, LENGTH, SIZE), naive(path, LENGTH))


def test_packet_that_says_nothing_new(tmp_path, counted):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        _, packets = encode(container, "mpeg4", {"g": "12"}, range(LENGTH), SIDE, SIDE)
        # A P picture that is "not coded", at tick 3 of the 10 in its second.
        silent = av.Packet(b"\0\0\1\xb6" + bytes([0b01_0_1_0011, 0b1_0_011111]))
        last = packets[-2]
        silent.stream, silent.pts, silent.dts = last.stream, last.pts, last.dts
        silent.time_base = last.time_base
        for packet in [*packets[:-2], silent, packets[-1]]:
            container.mux(packet)
    assert len(decode_all(path)[0]) == LENGTH - 1
    assert_all_same(path)
    assert counted


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


def test_default_generator_is_the_global_one(videos):
    torch.manual_seed(5)
    drawn = frame_indices(LENGTH, 8, "random")
    for name in ("h264", "vp8"):
        torch.manual_seed(5)
        clip = read_clip(videos(name), 8, SIZE, "random")
        assert_same(clip, decode_all(videos(name), SIZE)[1][drawn])


def test_surprise_does_not_change_the_draw(videos, monkeypatch, counted):
    def surprised(*arguments):
        raise video_file._Surprise

    monkeypatch.setattr(video_file, "_seek", surprised)
    clip = read_clip(videos("h264"), 8, SIZE, "random", generator=seeded())
    assert counted
    assert_same(clip, naive(videos("h264"), 8, "random"))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("rate", "fps", "step"), [(30, 30, 1), (30, 7.5, 4), (24, 8, 3), (60, 1, 60)]
)
def test_frames_at_a_rate(tmp_path, suffix, rate, fps, step):
    """Matroska counts in milliseconds: most frames are told to show earlier or later."""
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as container:
        _, packets = encode(container, "libx264", {}, range(LENGTH), SIDE, SIDE)
        for packet in packets:
            packet.time_base = Fraction(1, rate)
            container.mux(packet)
    wanted = list(range(0, LENGTH, step))
    for num_frames in (len(wanted), 2):
        clip = read_clip(path, num_frames, SIZE, fps=fps)
        chosen = [wanted[i] for i in frame_indices(len(wanted), num_frames)]
        assert_same(clip, decode_all(path)[1][chosen])


@pytest.mark.parametrize("fps", [RATE, 11, 1000, 1e300])
def test_a_rate_of_the_videos_own_or_more_takes_all_frames(videos, fps):
    for name in ("h264", "h264-ts", "vp8"):
        assert_same(read_clip(videos(name), LENGTH, SIZE, fps=fps), naive(videos(name), LENGTH))


def test_a_file_that_changes_while_it_is_read(videos, tmp_path, monkeypatch):
    path, count = tmp_path / "a.webm", video_file._count_frames
    path.write_bytes(videos("vp8").read_bytes())
    short = write_video(tmp_path / "b.webm", "libvpx", stamps=range(9))

    def count_then_replace(*arguments):
        counted = count(*arguments)
        short.replace(path)
        return counted

    monkeypatch.setattr(video_file, "_count_frames", count_then_replace)
    with pytest.raises(ClipError, match=rf"^{path}: changed while being read$"):
        read_clip(path, 8, SIZE)


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


def test_stream_without_timestamps_has_no_clock(videos):
    path = videos("h264-elementary")
    with pytest.raises(
        ClipError, match=rf"^{path}: start, end and fps need timestamps, .*; remux it"
    ):
        read_clip(path, start=1.0)
    with pytest.raises(ClipError, match=rf"^{path}: start, end and fps need timestamps, "):
        read_clip(path, fps=4)


@pytest.mark.parametrize("name", ["h264", "mpeg4-avi", "vp8"])
def test_start_beyond_the_end(name, videos):
    path = videos(name)
    reason = r"expected frames in \[30, inf\) s, got none; the last one before is at 4.400 s"
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
    capfd.readouterr()
    for end in (0.5, 1.0, 2.0):
        assert_same(read_clip(path, 4, SIZE, end=end), naive(source, 4, end=end))
    with pytest.raises(ClipError, match=rf"^{path}: frame [0-9]+ of .* depends on damaged data; "):
        read_clip(path, len(clean), SIZE)
    assert capfd.readouterr() == ("", "")


def damaged_reference(packets):
    """A frame amid a late group of pictures, decoded before the one that is shown before it."""
    return next(
        i
        for i in range(len(packets) // 2, len(packets))
        if packets[i].pts > packets[i + 1].pts
        and not any(p.is_keyframe for p in packets[i : i + 4])
    )


def assert_damage_spreads(path, source, time):
    """The frame at `time` is damaged, hence also the B frame before and the frame after."""
    assert_same(read_clip(path, 9, SIZE, end=time - 0.65), naive(source, 9, end=time - 0.65))
    for shown in (time - 0.1, time, time + 0.1):
        with pytest.raises(ClipError, match=rf"^{path}: frame [0-9]+ of {LENGTH} depends on dam"):
            read_clip(path, 1, SIZE, start=shown - 0.05, end=shown + 0.05)


def test_damage_that_only_the_transport_reports(videos, tmp_path):
    source, path = videos("h264-ts"), tmp_path / "a.ts"
    packets = packets_of(source)
    victim = packets[damaged_reference(packets)]
    # FFmpeg's parser may count the error bit of one frame against the frame before.
    for at in range(victim.pos, source.stat().st_size, 188):
        data = bytearray(source.read_bytes())
        data[at + 1] |= 0x80
        path.write_bytes(data)
        if [p.pts for p in packets_of(path) if p.is_corrupt] == [victim.pts]:
            break
    else:
        pytest.fail("no error bit marks the frame")
    assert torch.equal(decode_all(path)[1], decode_all(source)[1])
    first = min(p.pts for p in packets)
    assert_damage_spreads(path, source, float((victim.pts - first) * victim.time_base))


def test_damage_that_shows_only_with_the_frame(videos, tmp_path):
    """The decoder accepts the packet, and marks the frame that it gives out after a B frame."""
    source, path = videos("mpeg4-mp4"), tmp_path / "a.mp4"
    packets = packets_of(source)
    victim = packets[damaged_reference(packets)]
    for at in range(victim.size - 1, 0, -1):
        data = bytearray(source.read_bytes())
        data[victim.pos + at] ^= 0xFF
        path.write_bytes(data)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.options = {"err_detect": "explode"}
            try:
                marked = [f.pts for f in container.decode(stream) if f.is_corrupt]
            except av.FFmpegError:
                continue
        if marked[:1] == [victim.pts]:
            break
    else:
        pytest.fail("the decoder rejects or accepts all damage at once")
    first = min(p.pts for p in packets)
    assert_damage_spreads(path, source, float((victim.pts - first) * victim.time_base))


@pytest.mark.parametrize(
    ("suffix", "encoder", "options"),
    [
        (".mkv", "libx264", {"x264-params": "keyint=12:open-gop=1"}),
        (".ts", "libx264", {"x264-params": "keyint=12:open-gop=1"}),
        (".mkv", "libx265", {"x265-params": "keyint=12:open-gop=1:log-level=none"}),
        (".avi", "mpeg4", {"g": "12", "bf": "2"}),
        (".mkv", "mpeg4", {"g": "12", "bf": "2"}),
    ],
)
def test_recording_that_begins_with_a_keyframe_shown_late(tmp_path, suffix, encoder, options):
    """The frames shown before it lack what they were predicted from."""
    whole = packets_of(write_video(tmp_path / f"whole{suffix}", encoder, options))
    skip = next(
        i
        for i, packet in enumerate(whole)
        if i and packet.is_keyframe and packet.pts is not None and whole[i + 1].pts < packet.pts
    )
    path = write_video(tmp_path / f"a{suffix}", encoder, options, skip=skip)
    assert len(decode_all(path)[0]) < LENGTH - skip
    assert_all_same(path)
    for start in (0.3, 0.8):
        clip = read_clip(path, 3, SIZE, start=start, end=start + 0.5)
        assert_same(clip, naive(path, 3, start=start, end=start + 0.5))
