"""Decoded frames in a folder, so that a clip that is read again need not be decoded again."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import blake2b
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import torch
from torch import Tensor

from tokenmix_ops.video.data.clips import (
    Candidates,
    ClipError,
    Draw,
    height_and_width,
    read_chosen,
    to_floats,
    unfilled,
)
from tokenmix_ops.video.data.image_folder import numbered_images
from tokenmix_ops.video.data.quota import Quota, have_locks

# A file is this header (magic, number of frames, checksum of the two), then for every frame its
# checksum and its pixels, [3, height, width]. Frames are of the size that the file's name implies.
_HEADER = struct.Struct("<8sII")
_MAGIC = b"frames 1"
_CHECKSUM = struct.Struct("<I")


class FrameCache:
    """Frames of clips, decoded and resized, in a folder that takes at most ``max_bytes``.

    Of a clip whose frames are drawn at random all candidates are kept, else those of the clip;
    reading takes from the file what it needs. Several processes may use one folder; whoever is
    killed leaves nothing that others stumble over, and frames that a power failure or a bad disk
    spoilt are noticed, decoded anew and replaced. Once the folder is full, what is there stays
    and nothing is added: a training passes over its videos in turn, where to make room for the
    latest would always throw out what is needed soonest. Whoever changes the videos, ``size`` or
    ``fps`` should hence remove the folder. Where it cannot be written, frames are added no longer
    and a warning says why.

    Raises ValueError for ``max_bytes`` below 1, NotADirectoryError for a file, and RuntimeError on
    systems without POSIX file locks.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        if not have_locks():
            raise RuntimeError(
                "a frame cache needs the file locks of a POSIX system, which this one lacks; "
                "leave the cache out"
            )
        if type(max_bytes) is not int or max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes!r}, it must be a whole number, at least 1")
        # Workers may have another working directory.
        self.folder = Path(os.path.abspath(folder))
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder, so it cannot be a frame cache")
        self.quota = Quota(self.folder, max_bytes)
        self.adding = True
        self._unfit: set[str] = set()
        with self._or_stop():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.quota.recount()

    def taken(self) -> int:
        """Bytes that the folder takes, as they were last counted."""
        with self._or_stop():
            return self.quota.taken()
        return 0

    def read_clip(
        self,
        path: str | os.PathLike[str],
        num_frames: int = 8,
        size: int | tuple[int, int] = 224,
        sampling: str = "uniform",
        start: float | None = None,
        end: float | None = None,
        generator: torch.Generator | None = None,
        fps: float | None = None,
    ) -> Tensor:
        """What `clips.read_clip` returns or raises, bit for bit, from the folder if it is there."""
        candidates = Candidates(Path(path), height_and_width(size), start, end, fps)
        draw = Draw(num_frames, sampling, generator)
        try:
            file = self.folder / _name(candidates, draw)
        except (OSError, ClipError):
            # Reading tells best what is the matter with the path.
            return to_floats(read_chosen(candidates, draw))
        clip = self._kept(file, candidates, draw)
        if clip is None and self.adding and file.name not in self._unfit:
            try:
                clip = self._added(file, candidates, draw)
            except ClipError:
                if draw.sampling != "random":
                    raise
                # Frames that this clip does without may be damaged.
                self._unfit.add(file.name)
        return to_floats(read_chosen(candidates, draw) if clip is None else clip)

    def _kept(self, file: Path, candidates: Candidates, draw: Draw) -> Tensor | None:
        with self._or_stop(), suppress(FileNotFoundError), file.open("rb") as opened:
            clip = _load(opened, file, candidates, draw)
            if clip is None:
                self.quota.remove(file, opened.fileno())
            return clip
        return None

    def _added(self, file: Path, candidates: Candidates, draw: Draw) -> Tensor:
        clip = unfilled((draw.num_frames, 3, *candidates.size))
        places: dict[int, list[int]] = {}
        records: dict[int, int] = {}
        writer: _Writer | None = None

        def choose(count: int) -> Iterable[int]:
            nonlocal places, records, writer
            if writer is not None:
                self._close(writer)
            places = draw(count)
            wanted = range(count) if draw.sampling == "random" else sorted(places)
            records = {number: record for record, number in enumerate(wanted)}
            writer = self._writer(file, len(wanted), clip[0].numel())
            return places if writer is None else wanted

        try:
            for number, image in candidates.read(choose):
                if writer is not None and self.adding:
                    with self._or_stop():
                        writer.write(records[number], image)
                if number in places:
                    clip[places[number]] = image
            if writer is not None and self.adding:
                with self._or_stop():
                    writer.finish()
        finally:
            if writer is not None:
                self._close(writer)
        return clip

    def _writer(self, file: Path, count: int, frame_bytes: int) -> _Writer | None:
        """None where there is no room, or where another process is at it."""
        size = _HEADER.size + count * (_CHECKSUM.size + frame_bytes)
        with self._or_stop():
            part = self.quota.take(file, size)
            return None if part is None else _Writer(self.quota, file, part, count)
        return None

    def _close(self, writer: _Writer) -> None:
        with self._or_stop():
            writer.close()

    @contextmanager
    def _or_stop(self) -> Iterator[None]:
        """What goes wrong with the folder must not stop a training."""
        try:
            yield
        except OSError as error:
            if self.adding:
                self.adding = False
                warnings.warn(
                    f"no more frames are added to the cache {self.folder}: {error}", stacklevel=3
                )


class _Writer:
    """A file of frames in the making, whose name and space are taken; see `Quota.take`."""

    def __init__(self, quota: Quota, file: Path, part: BinaryIO, count: int) -> None:
        self.quota = quota
        self.file = file
        self.part = part
        self.count = count
        self.finished = False

    def write(self, record: int, image: Tensor) -> None:
        pixels = _bytes(image.contiguous())
        self.part.seek(_HEADER.size + record * (_CHECKSUM.size + len(pixels)))
        self.part.write(_CHECKSUM.pack(_checksum(pixels, record, self.file)))
        self.part.write(pixels)

    def finish(self) -> None:
        """Make the file one that others read."""
        self.part.seek(0)
        start = struct.pack("<8sI", _MAGIC, self.count)
        self.part.write(start + _CHECKSUM.pack(crc32(start)))
        self.part.flush()
        self.quota.keep(self.file)
        self.finished = True

    def close(self) -> None:
        """Leave nothing behind that is not finished."""
        try:
            if not self.finished:
                self.finished = True
                self.quota.give_back(self.file)
        finally:
            self.part.close()


def _load(opened: BufferedReader, file: Path, candidates: Candidates, draw: Draw) -> Tensor | None:
    """The clip, or None if its frames are not all as they were written."""
    header = opened.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    magic, count, checksum = _HEADER.unpack(header)
    if magic != _MAGIC or checksum != crc32(header[: -_CHECKSUM.size]) or not count:
        return None
    clip = unfilled((draw.num_frames, 3, *candidates.size))
    # Of what is kept uniformly chosen frames are all, in order: choosing again gives the same.
    for number, (place, *others) in draw(count).items():
        pixels = _bytes(clip[place])
        opened.seek(_HEADER.size + number * (_CHECKSUM.size + len(pixels)))
        checksum_read = opened.read(_CHECKSUM.size)
        if opened.readinto(pixels) < len(pixels):
            return None
        if checksum_read != _CHECKSUM.pack(_checksum(pixels, number, file)):
            return None
        for other in others:
            clip[other] = clip[place]
    return clip


def _bytes(image: Tensor) -> memoryview:
    """A contiguous image's memory."""
    return image.numpy().data.cast("B")


def _checksum(pixels: memoryview, record: int, file: Path) -> int:
    """Of a frame and of where it belongs, so that none stands for another."""
    return crc32(pixels, crc32(f"{file.name} {record}".encode()))


def _name(candidates: Candidates, draw: Draw) -> Path:
    """Of all that its frames depend on; OSError or ClipError where there is no video."""
    path = candidates.path
    files = [path]
    if path.is_dir():
        files, candidates = numbered_images(path), replace(candidates, fps=None)
    stamps = [
        (file.name, info.st_size, info.st_mtime_ns) for file in files if (info := file.stat())
    ]
    numbers = (candidates.start, candidates.end, candidates.fps)
    told = (
        *(_MAGIC, os.path.realpath(path), stamps, [int(side) for side in candidates.size]),
        *(None if number is None else float(number) for number in numbers),
        draw.num_frames if draw.sampling == "uniform" else None,
    )
    digest = blake2b(ascii(told).encode(), digest_size=20).hexdigest()
    return Path(digest[:2]) / f"{digest}.frames"
