"""Reads clips of many videos in worker processes, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenmix_ops.video.data.clips import ClipError, normalize_clip, read_clip
from tokenmix_ops.video.data.workers import OutliveSignals


class Clip(NamedTuple):
    """A model's view of a video, normalised [T, 3, size, size], or the error that prevented it.

    ``duration`` in seconds as stated by the file, None if it states none.
    """

    pixels: Tensor | None
    duration: float | None = None
    error: str | None = None


class Clips:
    """Reads a clip of uniformly chosen frames for each path, in order, with `read_clip`.

    ``workers`` processes read ahead and ignore Ctrl-C; with 0, this process reads.
    """

    def __init__(
        self, paths: Sequence[Path], num_frames: int, size: int, fps: float | None, workers: int
    ) -> None:
        self.dataset = _Clips(paths, num_frames, size, fps)
        self.workers = min(workers, len(paths))

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Clip]:
        outliving = OutliveSignals(self.workers)
        clips = iter(
            DataLoader(
                self.dataset,
                batch_size=None,
                num_workers=self.workers,
                collate_fn=_as_it_is,
                worker_init_fn=outliving,
                generator=torch.Generator(),
            )
        )
        try:
            yield from clips
        finally:
            outliving.end()


class _Clips(Dataset[Clip]):
    def __init__(
        self, paths: Sequence[Path], num_frames: int, size: int, fps: float | None
    ) -> None:
        self.paths, self.num_frames, self.size, self.fps = paths, num_frames, size, fps

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Clip:
        path = self.paths[index]
        try:
            pixels = normalize_clip(read_clip(path, self.num_frames, self.size, fps=self.fps))
        except ClipError as error:
            # Drop the path: the entry names the video, and an index may move with its videos.
            return Clip(None, error=str(error).removeprefix(f"{path}: "))
        return Clip(pixels, _duration(path))


def _duration(path: Path) -> float | None:
    if path.is_dir():
        return None
    try:
        with av.open(f"file:{path}") as container:
            return None if container.duration is None else container.duration / av.time_base
    except (av.FFmpegError, UnicodeDecodeError):
        # Tags may be in an unknown encoding; the frames are readable all the same.
        return None


def _as_it_is(clip: Any) -> Any:
    return clip
