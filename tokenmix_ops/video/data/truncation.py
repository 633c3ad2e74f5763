"""Checks that a video file has all the frames that its headers announce."""

from __future__ import annotations

from pathlib import Path

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from tokenmix_ops.video.data.errors import ClipError

_TRUNCATION_SECONDS = 1.0
# An MP4 has a handful of boxes; a fragmented one has two per fragment.
_MAX_BOXES = 100_000


def check_complete(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    count: int,
    indexed: int,
    reached: float,
) -> None:
    """Raise ClipError for a truncated file; only these formats' headers reveal truncation."""
    kind, listed, stated = container.format.name, 0, 0.0
    if kind.startswith("mov,"):
        listed = len(stream.index_entries)
        if count == listed and _cut_short(path):
            raise ClipError(f"{path}: is truncated within its frame table; download it again")
    elif kind == "avi":
        # The header's count may include gaps, so it matters only if the file is cut.
        listed = max(indexed, stream.frames) if _cut_short(path) else indexed
        stated = float(stream.frames / stream.average_rate) if stream.average_rate else 0.0
    elif kind == "matroska,webm":
        stated = (container.duration or 0) / av.time_base
    detail = f"{reached:.2f} of {stated:.2f} s" if reached + _TRUNCATION_SECONDS < stated else ""
    detail = f"{count} of {listed} frames" if count < listed else detail
    if detail:
        raise ClipError(f"{path}: is truncated: it has only {detail}; download it again")


def _cut_short(path: Path) -> bool:
    """Whether an AVI file is cut off, or an MP4 or QuickTime file is cut within its frame table.

    Returns False for sizes that recorders leave open, and for other formats.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        if head[:4] == b"RIFF":
            return int.from_bytes(head[4:8], "little") + 8 > size and not _left_open(head[4:8])
        at = 0
        for _ in range(_MAX_BOXES):
            length = int.from_bytes(head[:4], "big")
            length = int.from_bytes(head[8:16], "big") if length == 1 else length
            if head[4:8] == b"moov":
                return at + length > size
            if length < 8 or at + length >= size:
                return False
            at += length
            file.seek(at)
            head = file.read(16)
    return False


def _left_open(length: bytes) -> bool:
    return set(length) in ({0}, {0xFF})
