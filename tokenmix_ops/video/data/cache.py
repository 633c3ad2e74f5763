"""Caches decoded frames in a folder, so that later reads skip decoding."""

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

# File format: this header (magic, number of frames, checksum of both), then a checksum and pixels
# [3, height, width] per frame. The file's name is a hash that covers the frame size.
_HEADER = struct.Struct("<8sII")
_MAGIC = b"frames 1"
_CHECKSUM = struct.Struct("<I")


class FrameCache:
    """A cache of decoded, resized frames in a folder of at most ``max_bytes``.

    Stores all candidate frames of a randomly sampled clip, else only the clip's frames; a read
    loads only what it needs. Several processes may share a folder, a killed process does not
    corrupt it, and damaged frames are detected, decoded again and replaced. Once the folder is
    full, the cache evicts nothing and adds nothing: training cycles through its videos, so eviction
    would always drop the frames needed soonest. Remove the folder after changing the videos,
    ``size`` or ``fps``. If the folder becomes unwritable, the cache stops adding frames and warns.

    Raises ValueError for ``max_bytes`` below 1, NotADirectoryError for a file, and RuntimeError on
    systems without POSIX file locks.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        if not have_locks():
            raise RuntimeError(
                "a frame cache needs POSIX file locks, which this system lacks: run without a cache"
            )
        if type(max_bytes) is not int or max_bytes < 1:
            raise ValueError(f"max_bytes must be an integer of at least 1, got {max_bytes!r}")
        # Workers may have a different working directory.
        self.folder = Path(os.path.abspath(folder))
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"a frame cache needs a folder, but {folder} is a file")
        self.quota = Quota(self.folder, max_bytes)
        self.adding = True
        self._unfit: set[str] = set()
        with self._or_stop():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.quota.recount()

    def taken(self) -> int:
        """The folder's size in bytes, as last counted."""
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
        """Like `clips.read_clip`, bit for bit, but from the cache if possible."""
        candidates = Candidates(Path(path), height_and_width(size), start, end, fps)
        draw = Draw(num_frames, sampling, generator)
        try:
            file = self.folder / _name(candidates, draw)
        except (OSError, ClipError):
            # Reading raises the better error for a bad path.
            return to_floats(read_chosen(candidates, draw))
        clip = self._kept(file, candidates, draw)
        if clip is None and self.adding and file.name not in self._unfit:
            try:
                clip = self._added(file, candidates, draw)
            except ClipError:
                if draw.sampling != "random":
                    raise
                # The damaged frames may not be part of this clip.
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
        """Return None if there is no room, or if another process is writing the file."""
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
        """Turn cache errors into a warning, because they must not stop training."""
        try:
            yield
        except OSError as error:
            if self.adding:
                self.adding = False
                warnings.warn(
                    f"stopped adding frames to the cache {self.folder}: {error}", stacklevel=3
                )


class _Writer:
    """An unfinished file of frames with reserved name and space; see `Quota.take`."""

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
        """Publish the file to readers."""
        self.part.seek(0)
        start = struct.pack("<8sI", _MAGIC, self.count)
        self.part.write(start + _CHECKSUM.pack(crc32(start)))
        self.part.flush()
        self.quota.keep(self.file)
        self.finished = True

    def close(self) -> None:
        """Close the file; discard it if unfinished."""
        try:
            if not self.finished:
                self.finished = True
                self.quota.give_back(self.file)
        finally:
            self.part.close()


def _load(opened: BufferedReader, file: Path, candidates: Candidates, draw: Draw) -> Tensor | None:
    """Load the clip, or return None if any frame is damaged."""
    header = opened.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    magic, count, checksum = _HEADER.unpack(header)
    if magic != _MAGIC or checksum != crc32(header[: -_CHECKSUM.size]) or not count:
        return None
    clip = unfilled((draw.num_frames, 3, *candidates.size))
    # A uniform clip's file holds exactly its frames, so drawing among them selects all, in order.
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
    """View a contiguous image's memory."""
    return image.numpy().data.cast("B")


def _checksum(pixels: memoryview, record: int, file: Path) -> int:
    """Checksum a frame together with its place, so that frames cannot be mixed up."""
    return crc32(pixels, crc32(f"{file.name} {record}".encode()))


def _name(candidates: Candidates, draw: Draw) -> Path:
    """Hash everything that the frames depend on; raise OSError or ClipError without a video."""
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
