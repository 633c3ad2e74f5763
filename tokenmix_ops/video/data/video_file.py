"""Reads chosen frames of a video file: seeks if its packets identify the frames, else counts."""

from __future__ import annotations

import stat
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from tokenmix_ops.video.data.errors import ClipError, configure
from tokenmix_ops.video.data.truncation import check_complete

# Codecs whose packets each show one frame; VP8, for example, has packets with hidden frames.
_FRAME_PER_PACKET = {"h264", "hevc", "av1", "vp9", "mpeg4", "mjpeg", "ffv1", "prores"}
# FFmpeg's size bound on an MPEG-4 packet that means "no change" and yields no frame.
_MPEG4_SKIP_BYTES = 19
# The size of the H.264 picture buffer; no decoder here delays more frames.
_MAX_REORDER = 16
# Decoders that silently draw changes on black if there is no keyframe.
_DRAW_ON_BLACK = {"mpeg4", "h263", "h263p", "flv1", "wmv1", "wmv2"} | {
    f"msmpeg4v{version}" for version in (1, 2, 3)
}
# FFmpeg opens these text formats as video; concat even names other files.
_TEXT_FORMATS = {"tty", "concat"}
# PyAV 19 does this by default and has dropped the argument.
_LENIENT: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
)

_Chooser = Callable[[int, Sequence[float] | None], dict[int, list[int]]]


class Facts(NamedTuple):
    """Properties of a video, or of a span of it."""

    duration: float | None
    """Seconds; None if unknown."""
    num_frames: int
    fps: float | None
    width: int
    height: int


class _Surprise(Exception):
    """Decoding contradicts the packets, so the frames need a full decode."""


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


def read_frames(
    path: Path, choose: _Chooser, end: float = float("inf")
) -> Iterator[tuple[list[int], VideoFrame]]:
    """Yield the chosen frames of a video's default stream, each with the slots it fills.

    `choose` receives the number of frames and their times in seconds after the first (None if any
    frame lacks a timestamp), and maps positions to slots. It must not choose frames at `end` or
    later, because it may not see all of them. If decoding contradicts the packets, `choose` is
    called again and the frames restart from the first. Raises ClipError if the file is not a video
    or is truncated before `end`, or if a chosen frame depends on data that the decoder reports as
    damaged.
    """
    with _opened(path) as (container, stream):
        packets = _scan(path, container, stream, end)
        if packets:
            shown = sorted(packet.pts for packet in packets if packet.shown)
            slots = choose(len(shown), _times(shown, stream.time_base))
            with suppress(_Surprise, av.FFmpegError):
                for position, frame in _decode_chosen(container, stream, packets, shown, slots):
                    yield slots[position], frame
                return
        time_base = stream.time_base
    pts, damaged = _count_frames(path, bool(packets))
    slots = choose(len(pts), _times(pts, time_base))
    for position in slots:
        if damaged[position]:
            raise ClipError(
                f"{path}: frame {position} of {len(pts)} depends on damaged data; replace the "
                "file, or read a span without that frame"
            )
    decoded_frames = _decode_all(path, bool(packets))
    for position, decoded in zip(range(max(slots) + 1), decoded_frames, strict=False):
        if position in slots and decoded.frame is not None:
            yield slots[position], decoded.frame


def probe(path: Path, start: float | None = None, end: float | None = None) -> Facts:
    """Read a video's properties from its container, for the stream that `read_frames` reads.

    Decodes only if neither packets nor header give the number of frames. Raises as `read_frames`
    does if the file is not a video or is truncated before `end`.
    """
    low, high = start or 0.0, float("inf") if end is None else end
    with _opened(path) as (container, stream):
        packets = _scan(path, container, stream, high)
        pts: Sequence[int | None] = sorted(packet.pts for packet in packets if packet.shown)
        base, rate, stated = stream.time_base, stream.average_rate, stream.frames
        width, height = stream.codec_context.width, stream.codec_context.height
        length = float("inf")
        if stream.duration is not None and base is not None:
            length = _seconds(stream.duration, base)
        elif container.duration is not None:
            length = container.duration / av.time_base
    whole = start is None and end is None
    if not packets and not (whole and stated):
        pts, _ = _count_frames(path, False)
    times = None if whole else _times(pts, base)
    count = sum(low <= t < high for t in times) if times is not None else len(pts) or stated
    duration = round(min(length, high) - low, 6)
    return Facts(
        duration if 0 <= duration < float("inf") else None,
        count,
        float(rate) if rate else None,
        width,
        height,
    )


def _times(pts: Sequence[int | None], time_base: Fraction | None) -> list[float] | None:
    known = [t for t in pts if t is not None]
    if len(known) < len(pts) or time_base is None:
        return None
    first = min(known)
    return [_seconds(t - first, time_base) for t in known]


def _seconds(ticks: float, time_base: Fraction) -> float:
    """Convert to the nearest float, so that 0.1 s is 0.1."""
    return ticks * time_base.numerator / time_base.denominator


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise ClipError(f"{path}: is neither a file nor a folder")
    if not info.st_size:
        raise ClipError(f"{path}: is empty")
    # The prefix keeps FFmpeg from reading a name with a colon as a protocol; _LENIENT accepts tags
    # in an unknown encoding.
    with av.open(f"file:{path}", **_LENIENT) as container:
        if container.format.name in _TEXT_FORMATS:
            raise ClipError(f"{path}: is text, not a video")
        cover, default = Disposition.attached_pic, Disposition.default
        videos = [s for s in container.streams.video if not s.disposition & cover]
        decodable = [s for s in videos if s.codec_context is not None]
        if not decodable:
            reason = "no decoder for its video stream" if videos else "no video stream"
            raise ClipError(f"{path}: has {reason}")
        stream = max(decodable, key=lambda s: (bool(s.disposition & default), s.width * s.height))
        configure(stream.codec_context)
        yield container, stream


def _demux(
    path: Path, container: InputContainer, *streams: Stream
) -> Iterator[Packet[VideoStream]]:
    try:
        for packet in container.demux(*streams):
            yield cast("Packet[VideoStream]", packet)
    except IndexError as error:
        # PyAV 18 fails on a stream that the beginning of the file does not announce.
        raise ClipError(f"{path}: gains a stream midway; remux it first") from error


def _scan(path: Path, container: InputContainer, stream: VideoStream, end: float) -> list[_Packet]:
    """Return the packets in decoding order, including all that show before `end`.

    Returns none if the packets do not identify the shown frames.
    """
    packets: list[_Packet] = []
    codec = stream.codec_context.codec.canonical_name
    count, reached, trusted = 0, 0.0, codec in _FRAME_PER_PACKET
    # AVI's index grows while packets are read.
    indexed = len(stream.index_entries)
    first = float("inf")
    for packet in _demux(path, container, *container.streams):
        if not packet.size and packet.dts is None:
            continue
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is not None:
            reached = max(reached, _seconds(stamp + (packet.duration or 0), packet.time_base))
        if packet.stream_index != stream.index:
            continue
        late = packet.dts is not None and _seconds(packet.dts - first, packet.time_base) >= end
        # No frame is shown before it is decoded; stopping between keyframes would cut references.
        if late and packet.is_keyframe:
            break
        count += 1
        trusted &= packet.size > (_MPEG4_SKIP_BYTES if codec == "mpeg4" else 0)
        trusted &= not packet.is_corrupt
        if packet.pts is not None:
            shown = not packet.is_discard
            packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe, shown))
            first = min(first, packet.pts) if shown else first
    else:
        check_complete(path, container, stream, count, indexed, reached)
    trusted &= len({packet.pts for packet in packets}) == count
    # Frames shown before the first keyframe depend on data that the file lacks.
    trusted &= first < float("inf") and packets[0].key and packets[0].pts <= first
    return packets if trusted else []


def _decode_chosen(
    container: InputContainer,
    stream: VideoStream,
    packets: Sequence[_Packet],
    shown: Sequence[int],
    chosen: Iterable[int],
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield frames by position in `shown`, decoding from the keyframe before each.

    Raises _Surprise at the first frame that the packets do not announce.
    """
    for run in _runs(packets, shown, chosen):
        begin, demuxed = _seek(container, stream, packets[run.key])
        position = bisect_left(shown, begin)
        # A frame may show before its reference, whose damage becomes known only later.
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
) -> tuple[int, Iterator[Packet[VideoStream]]]:
    """Return the timestamp of the packet reached, at or before `key`, and the packets from it."""
    # Some formats seek by presentation time, others by decoding time.
    for target in (key.pts, key.dts):
        if target is not None:
            container.seek(target, stream=stream)
            packets = container.demux(stream)
            first = next(packets)
            if first.pts is not None and first.pts <= key.pts:
                return first.pts, chain([first], packets)
    raise _Surprise


def _decode_from(begin: int, packets: Iterable[Packet[VideoStream]]) -> Iterator[VideoFrame]:
    for packet in packets:
        try:
            frames = packet.decode()
        except av.FFmpegError:
            # Frames shown before the keyframe may depend on data that was not decoded.
            if packet.pts is None or packet.pts >= begin:
                raise
            continue
        yield from (frame for frame in frames if frame.pts is None or frame.pts >= begin)


def _runs(packets: Sequence[_Packet], shown: Sequence[int], chosen: Iterable[int]) -> list[_Run]:
    """Group the chosen frames into runs of packets to decode without seeking."""
    order = {packet.pts: i for i, packet in enumerate(packets)}
    keys = [i for i, packet in enumerate(packets) if packet.key]
    runs: list[_Run] = []
    for position in sorted(chosen):
        at = order[shown[position]]
        nearest = bisect_right(keys, at) - 1
        while packets[keys[nearest]].pts > shown[position]:
            nearest -= 1
        key = keys[nearest]
        if runs and key <= runs[-1].last + _MAX_REORDER:
            before = runs.pop()
            before.positions.add(position)
            runs.append(_Run(before.key, max(before.last, at), before.positions))
        else:
            runs.append(_Run(key, at, {position}))
    return runs


def _decode_all(path: Path, announced: bool) -> Iterator[_Decoded]:
    """Yield every frame in order; frames rejected, or lost after damage, count as damaged.

    Damage lasts until the next intact keyframe. `announced` means that each packet shows a frame.
    """
    with _opened(path) as (container, stream):
        corrupt: set[int | None] = set()
        awaited: set[int] = set()
        keys: set[int | None] = set()
        begun = damaged = ever = False
        keyless = stream.codec_context.codec.canonical_name in _DRAW_ON_BLACK
        for packet in _demux(path, container, stream):
            # Skip empty packets: they tell the decoder that the stream has ended.
            if not packet.size and packet.dts is not None:
                continue
            if packet.is_corrupt:
                corrupt.add(packet.pts)
            if packet.is_keyframe:
                keys.add(packet.pts)
            if announced and packet.pts is not None and not packet.is_discard:
                awaited.add(packet.pts)
            try:
                frames = packet.decode()
            except av.FFmpegError:
                damaged = True
                ever |= begun
                # A recording may start between keyframes, which is not damage.
                if begun and packet.size:
                    # Some decoders still output a frame for such a packet later.
                    if packet.pts is not None:
                        awaited.add(packet.pts)
                        corrupt.add(packet.pts)
                    else:
                        yield _Decoded(None, None, True)
                continue
            for frame in frames:
                keyless = keyless and not (frame.key_frame or damaged)
                if keyless:
                    if frame.pts is not None:
                        awaited.discard(frame.pts)
                    continue
                # AV1's decoder marks all intra frames as keys; later frames may refer past them.
                key = frame.key_frame and (not announced or frame.pts in keys)
                damaged = damaged and not key
                damaged |= frame.is_corrupt or frame.pts in corrupt
                ever |= damaged
                if frame.pts is not None:
                    lost = sorted(pts for pts in awaited if pts < frame.pts)
                    awaited.difference_update(lost, [frame.pts])
                    yield from (_Decoded(pts, None, True) for pts in lost if begun and ever)
                begun = True
                yield _Decoded(frame.pts, frame, damaged)
        yield from (_Decoded(pts, None, True) for pts in sorted(awaited) if begun and ever)


def _count_frames(path: Path, announced: bool) -> tuple[list[int | None], list[bool]]:
    """Return the presentation timestamp and damage of every frame in order."""
    pts: list[int | None] = []
    damaged: list[bool] = []
    bidirectional: list[bool] = []
    for decoded in _decode_all(path, announced):
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
