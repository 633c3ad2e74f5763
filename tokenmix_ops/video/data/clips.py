"""From the path of a video, or of a folder of numbered images, to a tensor of chosen frames."""

import os
import re
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, cast

import av
import torch
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor
from torch.nn.functional import interpolate

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Codecs whose packets each show one frame; VP8, for one, hides frames in packets of their own.
_FRAME_PER_PACKET = {"h264", "hevc", "av1", "vp9", "mpeg4", "mjpeg", "ffv1", "prores"}
# FFmpeg's bound on an MPEG-4 packet that says "nothing new" and yields no frame.
_MPEG4_SKIP_BYTES = 19
# The H.264 picture buffer; no decoder here holds back more frames.
_MAX_REORDER = 16
# FFmpeg reads these as video although they are text, or text that names other files.
_TEXT_FORMATS = {"tty", "concat"}
_IMAGE_CODECS: dict[bytes, Literal["mjpeg", "png"]] = {b"\xff\xd8\xff": "mjpeg", b"\x89PNG": "png"}
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
# Without "explode" decoders conceal much of the damage that they notice.
_DECODER_OPTIONS = {"err_detect": "explode"}
# Exact to one level on a plain colour, where swscale's default is off by two.
_SCALING = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_TRUNCATION_SECONDS = 1.0

_Chooser = Callable[[Sequence[int | None], Fraction | None], list[int]]


class ClipError(ValueError):
    """A video or folder cannot give the frames asked for; names the path and the reason."""


class _Surprise(Exception):
    """Decoding disagrees with the packets, so only a full decode knows the frames."""


class _Packet(NamedTuple):
    pts: int
    dts: int | None
    key: bool
    shown: bool


class _Run(NamedTuple):
    key: int
    last: int
    positions: set[int]


class _Decoded(NamedTuple):
    pts: int | None
    frame: VideoFrame | None
    damaged: bool


def frame_indices(
    num_available: int,
    num_frames: int,
    sampling: str = "uniform",
    generator: torch.Generator | None = None,
) -> list[int]:
    """Choose `num_frames` ascending indices below `num_available`.

    "uniform" takes floor(i * num_available / num_frames), "random" distinct ones drawn with
    `generator`; where there are too few frames both repeat them by the uniform formula. Raises
    ValueError for counts below 1 and other samplings.
    """
    for name, value in (("num_available", num_available), ("num_frames", num_frames)):
        if value < 1:
            raise ValueError(f"{name} is {value}, it must be at least 1")
    if sampling not in ("uniform", "random"):
        raise ValueError(f"sampling is {sampling!r}, it must be 'uniform' or 'random'")
    if sampling == "random" and num_available >= num_frames:
        return sorted(torch.randperm(num_available, generator=generator)[:num_frames].tolist())
    return [i * num_available // num_frames for i in range(num_frames)]


def read_clip(
    path: str | os.PathLike[str],
    num_frames: int = 8,
    size: int | tuple[int, int] = 224,
    sampling: str = "uniform",
    start: float | None = None,
    end: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Read chosen frames of a video file or image folder as float32 RGB in [0, 1].

    Returns [num_frames, 3, height, width]: upright frames, each resized without crop (bicubic,
    antialiased) to `size`, an int or (height, width). `start` and `end` are seconds after the
    video's first frame; `frame_indices` chooses among the frames whose time is in [start, end).
    Of several video streams the default one is read, then the largest. Raises ValueError for
    arguments out of range and ClipError for what is wrong with the path. A chosen frame that
    depends on data the decoder reports as damaged raises; damage elsewhere is tolerated.
    """
    height, width = _height_and_width(size)
    frame_indices(1, num_frames, sampling)
    _check_span(start, end)
    path = Path(path)
    rng = torch.default_generator if generator is None else generator
    out = torch.empty(num_frames, 3, height, width)

    def choose(pts: Sequence[int | None], time_base: Fraction | None) -> list[int]:
        window = _window(path, pts, time_base, start, end)
        return [window[i] for i in frame_indices(len(window), num_frames, sampling, rng)]

    try:
        if not path.is_dir():
            _read_video(path, out, choose, rng)
        elif start is not None or end is not None:
            raise ClipError(
                f"{path}: a folder of images has no clock, so start and end must be left out"
            )
        else:
            files = _numbered_images(path)
            chosen = choose([None] * len(files), None)
            _fill(out, chosen, ((i, _decode_image(files[i])) for i in sorted(set(chosen))))
    except (av.FFmpegError, OSError) as error:
        raise ClipError(f"{path}: cannot be read: {error.strerror or error}") from error
    return out


def normalize_clip(clip: Tensor) -> Tensor:
    """Normalise RGB [..., 3, height, width] in [0, 1] by CLIP's mean and standard deviation.

    Raises ValueError for another shape.
    """
    if clip.dim() < 3 or clip.shape[-3] != 3:
        raise ValueError(f"clip has shape {tuple(clip.shape)}, it must be [..., 3, height, width]")
    mean = clip.new_tensor(CLIP_MEAN).view(3, 1, 1)
    return (clip - mean) / clip.new_tensor(CLIP_STD).view(3, 1, 1)


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"size is {size}, it must be an int or (height, width), each at least 1")
    return sides[0], sides[1]


def _check_span(start: float | None, end: float | None) -> None:
    if start is not None and not 0 <= start < float("inf"):
        raise ValueError(f"start is {start}, it must be in seconds, 0 or more")
    if end is not None and not end > (start or 0):
        raise ValueError(f"end is {end}, it must be in seconds, more than start, {start or 0}")


def _window(
    path: Path,
    pts: Sequence[int | None],
    time_base: Fraction | None,
    start: float | None,
    end: float | None,
) -> Sequence[int]:
    """Positions of the frames in [start, end)."""
    if start is None and end is None:
        return range(len(pts))
    known = [t for t in pts if t is not None]
    if len(known) < len(pts) or time_base is None:
        raise ClipError(
            f"{path}: start and end need timestamps, which its frames lack; "
            "remux it, or leave them out"
        )
    first = min(known)
    # Rounded to float so that start=0.1 meets a frame at 1/10 s.
    times = [float((t - first) * time_base) for t in known]
    low, high = start or 0.0, float("inf") if end is None else end
    window = [i for i, t in enumerate(times) if low <= t < high]
    if not window:
        raise ClipError(
            f"{path}: no frame has its time in [{low}, {high}) s; its {len(times)} frames are at "
            f"0 to {max(times):.3f} s"
        )
    return window


def _fill(out: Tensor, chosen: Sequence[int], frames: Iterable[tuple[int, VideoFrame]]) -> None:
    """Resize each frame as it comes, so that no full-size frame is kept."""
    reformatter = VideoReformatter()
    for position, frame in frames:
        image = _to_image(frame, out.shape[-2:], reformatter)
        for slot in range(bisect_left(chosen, position), bisect_right(chosen, position)):
            out[slot] = image


def _to_image(frame: VideoFrame, size: Sequence[int], reformatter: VideoReformatter) -> Tensor:
    """RGB [3, height, width] in [0, 1], upright.

    Matrix and range are the frame's own; where it names none, FFmpeg takes BT.601, limited.
    """
    rgb = reformatter.reformat(
        frame,
        format="rgb24",
        interpolation=_SCALING,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    )
    plane = rgb.planes[0]
    rows = torch.frombuffer(plane, dtype=torch.uint8).view(-1, plane.line_size)
    pixels = rows[: rgb.height, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3)
    upright = torch.rot90(pixels, round(frame.rotation / 90))
    image = upright.permute(2, 0, 1).contiguous().float().div_(255)
    return interpolate(image[None], list(size), mode="bicubic", antialias=True)[0].clamp_(0, 1)


def _read_video(path: Path, out: Tensor, choose: _Chooser, rng: torch.Generator) -> None:
    """Read by timestamp where packets tell the frames, else by counting decoded frames."""
    state = rng.get_state()
    with _opened(path) as (container, stream):
        packets = _scan(path, container, stream)
        if packets:
            shown = sorted(packet.pts for packet in packets if packet.shown)
            chosen = choose(shown, stream.time_base)
            try:
                _fill(out, chosen, _decode_chosen(container, stream, packets, shown, chosen))
                return
            except (_Surprise, av.FFmpegError):
                rng.set_state(state)
        time_base = stream.time_base
    pts, damaged = _count_frames(path)
    chosen = choose(pts, time_base)
    for position in chosen:
        if damaged[position]:
            raise ClipError(
                f"{path}: frame {position} of {len(pts)} depends on damaged data; replace the "
                "file, or read a span without that frame"
            )
    decoded = zip(range(chosen[-1] + 1), _decode_all(path), strict=False)
    wanted = set(chosen)
    _fill(out, chosen, ((i, d.frame) for i, d in decoded if d.frame is not None and i in wanted))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise ClipError(f"{path}: is neither a file nor a folder")
    if not info.st_size:
        raise ClipError(f"{path}: is empty")
    # The prefix keeps FFmpeg from taking a name with a colon for a protocol, and tags in an
    # unknown encoding are no reason to refuse a video.
    with av.open(f"file:{path}", metadata_errors="replace") as container:
        if container.format.name in _TEXT_FORMATS:
            raise ClipError(f"{path}: is text, not a video")
        cover, default = Disposition.attached_pic, Disposition.default
        videos = [s for s in container.streams.video if not s.disposition & cover]
        decodable = [s for s in videos if s.codec_context is not None]
        if not decodable:
            reason = "no decoder for its video stream" if videos else "no video stream"
            raise ClipError(f"{path}: has {reason}")
        stream = max(decodable, key=lambda s: (bool(s.disposition & default), s.width * s.height))
        # Few frames are read at a time and data loaders run many workers: further threads would
        # compete with those, and frame threads decode ahead what is never shown.
        stream.codec_context.thread_count = 1
        stream.codec_context.options = _DECODER_OPTIONS
        yield container, stream


def _demux(
    path: Path, container: InputContainer, *streams: Stream
) -> Iterator["Packet[VideoStream]"]:
    try:
        for packet in container.demux(*streams):
            yield cast("Packet[VideoStream]", packet)
    except IndexError as error:
        # PyAV 18 keeps no place for a stream that the beginning of the file does not announce.
        raise ClipError(f"{path}: gains a stream midway, which needs remuxing first") from error


def _scan(path: Path, container: InputContainer, stream: VideoStream) -> list[_Packet]:
    """All packets in decoding order, or none where they do not tell which frames are shown.

    Raises ClipError for a file that ends before what its header promises.
    """
    packets: list[_Packet] = []
    codec = stream.codec_context.codec.canonical_name
    count, reached, trusted = 0, 0.0, codec in _FRAME_PER_PACKET
    for packet in _demux(path, container, *container.streams):
        if not packet.size and packet.dts is None:
            continue
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is not None:
            reached = max(reached, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index:
            continue
        count += 1
        trusted &= packet.size > (_MPEG4_SKIP_BYTES if codec == "mpeg4" else 0)
        trusted &= not packet.is_corrupt
        if packet.pts is not None:
            shown = not packet.is_discard
            packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe, shown))
    _check_complete(path, container, stream, count, reached)
    trusted &= len({packet.pts for packet in packets}) == count
    # Frames shown before the first keyframe hang on data that the file lacks.
    times = [packet.pts for packet in packets if packet.shown]
    return packets if trusted and times and packets[0].key and packets[0].pts <= min(times) else []


def _check_complete(
    path: Path, container: InputContainer, stream: VideoStream, count: int, reached: float
) -> None:
    """Raise ClipError for a cut file; only these headers tell it from a short one."""
    kind, stated = container.format.name, 0.0
    if kind.startswith("mov,") and count < len(stream.index_entries):
        detail = f"{count} of {len(stream.index_entries)} frames"
        raise ClipError(f"{path}: is truncated, only {detail} are there; fetch it again")
    if kind == "avi" and stream.average_rate:
        stated = float(stream.frames / stream.average_rate)
    elif kind == "matroska,webm":
        stated = (container.duration or 0) / av.time_base
    if reached + _TRUNCATION_SECONDS < stated:
        detail = f"{reached:.2f} of {stated:.2f} s"
        raise ClipError(f"{path}: is truncated, only {detail} are there; fetch it again")


def _decode_chosen(
    container: InputContainer,
    stream: VideoStream,
    packets: Sequence[_Packet],
    shown: Sequence[int],
    chosen: Iterable[int],
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames by position in `shown`, decoding from the keyframe before each.

    Raises _Surprise as soon as any other frame than the packets announce comes out.
    """
    for run in _runs(packets, shown, chosen):
        begin, demuxed = _seek(container, stream, packets[run.key])
        position = bisect_left(shown, begin)
        # A frame may show before one it was predicted from, whose damage is known only later.
        stop = max(p.pts for p in packets[run.key : run.last + 1] if p.shown)
        for frame in _decode_from(begin, demuxed):
            if position == len(shown) or frame.pts != shown[position] or frame.is_corrupt:
                raise _Surprise
            if position in run.positions:
                yield position, frame
            position += 1
            if frame.pts >= stop:
                break
        else:
            raise _Surprise


def _seek(
    container: InputContainer, stream: VideoStream, key: _Packet
) -> tuple[int, Iterator["Packet[VideoStream]"]]:
    """Timestamp of the keyframe reached, at or before `key`, and the packets from it on."""
    # Some formats seek by presentation time, others by decoding time.
    for target in (key.pts, key.dts):
        if target is not None:
            container.seek(target, stream=stream)
            packets = container.demux(stream)
            first = next(packets)
            if first.is_keyframe and first.pts is not None and first.pts <= key.pts:
                return first.pts, chain([first], packets)
    raise _Surprise


def _decode_from(begin: int, packets: Iterable["Packet[VideoStream]"]) -> Iterator[VideoFrame]:
    for packet in packets:
        try:
            frames = packet.decode()
        except av.FFmpegError:
            # Frames shown before the keyframe may depend on what was not decoded.
            if packet.pts is None or packet.pts >= begin:
                raise
            continue
        yield from (frame for frame in frames if frame.pts is None or frame.pts >= begin)


def _runs(packets: Sequence[_Packet], shown: Sequence[int], chosen: Iterable[int]) -> list[_Run]:
    """Stretches of packets to decode without seeking in between."""
    order = {packet.pts: i for i, packet in enumerate(packets)}
    keys = sorted(packet.pts for packet in packets if packet.key)
    runs: list[_Run] = []
    for position in sorted(set(chosen)):
        at = order[shown[position]]
        key = order[keys[bisect_right(keys, shown[position]) - 1]]
        if key > at:
            raise _Surprise
        if runs and key <= runs[-1].last + _MAX_REORDER:
            before = runs.pop()
            runs.append(_Run(before.key, max(before.last, at), before.positions | {position}))
        else:
            runs.append(_Run(key, at, {position}))
    return runs


def _decode_all(path: Path) -> Iterator[_Decoded]:
    """Every frame in order; a packet the decoder rejects stands as a damaged one.

    Damage lasts until the next sound keyframe.
    """
    with _opened(path) as (container, stream):
        corrupt: set[int | None] = set()
        begun = damaged = False
        for packet in _demux(path, container, stream):
            # To decode an empty packet would tell the decoder that the stream is over.
            if not packet.size and packet.dts is not None:
                continue
            if packet.is_corrupt:
                corrupt.add(packet.pts)
            try:
                frames = packet.decode()
            except av.FFmpegError:
                damaged = True
                # A recording may begin between keyframes: that is no damage to count.
                if begun and packet.size:
                    yield _Decoded(packet.pts, None, True)
                continue
            for frame in frames:
                begun = True
                damaged = damaged and not frame.key_frame
                damaged |= frame.is_corrupt or frame.pts in corrupt
                yield _Decoded(frame.pts, frame, damaged)


def _count_frames(path: Path) -> tuple[list[int | None], list[bool]]:
    """Presentation timestamp and damage of every frame in order."""
    pts: list[int | None] = []
    damaged: list[bool] = []
    bidirectional: list[bool] = []
    for decoded in _decode_all(path):
        pts.append(decoded.pts)
        damaged.append(decoded.damaged)
        frame = decoded.frame
        bidirectional.append(frame is not None and frame.pict_type == PictureType.B)
    if not pts:
        raise ClipError(f"{path}: no frame of its video stream can be decoded")
    for i in reversed(range(1, len(pts))):
        # A B frame may be predicted from the frame shown after it.
        damaged[i - 1] |= damaged[i] and bidirectional[i - 1]
    return pts, damaged


def _numbered_images(folder: Path) -> list[Path]:
    """Images of a folder by the last number in their names."""
    numbered: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in _IMAGE_SUFFIXES or file.name.startswith("."):
            continue
        digits = re.findall(r"[0-9]+", file.stem)
        if not digits:
            raise ClipError(f"{file}: has no number in its name to order it by; rename or move it")
        other = numbered.setdefault(int(digits[-1]), file)
        if other != file:
            raise ClipError(f"{file}: has the same number as {other.name}; remove one of them")
    if not numbered:
        raise ClipError(f"{folder}: has no numbered .jpg, .jpeg or .png images")
    return [numbered[number] for number in sorted(numbered)]


def _decode_image(file: Path) -> VideoFrame:
    data = file.read_bytes()
    codec = next((c for magic, c in _IMAGE_CODECS.items() if data.startswith(magic)), None)
    if codec is None:
        raise ClipError(f"{file}: is not a JPEG or PNG image")
    decoder = av.CodecContext.create(codec, "r")
    decoder.thread_count = 1
    decoder.options = _DECODER_OPTIONS
    try:
        frames = decoder.decode(av.Packet(data)) + decoder.decode(None)
    except av.FFmpegError as error:
        raise ClipError(f"{file}: is damaged: {error.strerror}") from error
    if not frames or frames[0].is_corrupt:
        raise ClipError(f"{file}: is damaged")
    return frames[0]
