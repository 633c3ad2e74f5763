"""Clips of many videos, read in worker processes and given in order."""

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
    """What a model sees of a video, [T, 3, size, size] and normalised, or why that is nothing.

    ``duration`` in seconds as the file states it, None where it does not.
    """

    pixels: Tensor | None
    duration: float | None = None
    error: str | None = None


class Clips:
    """A clip of each path in order, of frames chosen uniformly, as `read_clip` reads them.

    ``workers`` processes read ahead; with 0 this one reads. They leave Ctrl-C to it.
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
            # Where the video is said beside it; an index may move with its videos.
            return Clip(None, error=str(error).removeprefix(f"{path}: "))
        return Clip(pixels, _duration(path))


def _duration(path: Path) -> float | None:
    if path.is_dir():
        return None
    try:
        with av.open(f"file:{path}") as container:
            return None if container.duration is None else container.duration / av.time_base
    except (av.FFmpegError, UnicodeDecodeError):
        # Tags in an unknown encoding: its frames could be read all the same.
        return None


def _as_it_is(clip: Any) -> Any:
    return clip
