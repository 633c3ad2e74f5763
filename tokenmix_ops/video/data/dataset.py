"""Data sets and batches, built from a manifest, for training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from tokenmix_ops.video.data.cache import FrameCache
from tokenmix_ops.video.data.clips import (
    Candidates,
    ClipError,
    frame_indices,
    height_and_width,
    normalize_clip_,
    read_clip,
)
from tokenmix_ops.video.data.manifest import Manifest, Video
from tokenmix_ops.video.data.sampling import generator_for
from tokenmix_ops.video.data.unreadable import Unreadable


class Clips(Dataset[dict[str, Any]]):
    """One item per video of a split, with uniformly chosen frames, at ``fps`` if given.

    Item ``row`` is {"pixels": [num_frames, 3, height, width] float32, normalised by
    `normalize_clip`, "video": row}; a ``cache`` does not change it. Raises ValueError if the split
    has no video, or for numbers out of range; reading an item raises ClipError with the path if it
    fails.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        num_frames: int = 8,
        size: int | tuple[int, int] = 224,
        fps: float | None = None,
        cache: FrameCache | None = None,
    ) -> None:
        frame_indices(1, num_frames)
        Candidates(Path(), height_and_width(size), fps=fps)
        self.manifest = manifest
        self.videos = manifest.of_split(split)
        self.num_frames = num_frames
        self.size = size
        self.fps = fps
        self.cache = cache

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixels": self._pixels(self.videos[row], "uniform", None), "video": row}

    def _pixels(self, video: Video, sampling: str, generator: torch.Generator | None) -> Tensor:
        read = read_clip if self.cache is None else self.cache.read_clip
        clip = read(
            self.manifest.path_of(video),
            self.num_frames,
            self.size,
            sampling,
            video.start,
            video.end,
            generator,
            self.fps,
        )
        return normalize_clip_(clip)


class CaptionedClips(Clips):
    """One item per caption of a split, with frames of the caption's video.

    Item ``index``, or (epoch, index) from `EpochBatches`, is {"pixels": [num_frames, 3, height,
    width] float32, normalised, "caption": str, "video": the video's index in ``videos``}. Frames
    are drawn at random and depend only on seed, epoch and index, not on workers or processes. An
    unreadable video is added to ``unreadable`` and replaced by another random caption. Raises
    ValueError if the split has no caption; reading an item raises ClipError with the path if there
    is no ``unreadable`` list, and ValueError if the list exceeds its limit.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        num_frames: int = 8,
        size: int | tuple[int, int] = 224,
        fps: float | None = None,
        cache: FrameCache | None = None,
        seed: int = 0,
        unreadable: Unreadable | None = None,
    ) -> None:
        super().__init__(manifest, split, num_frames=num_frames, size=size, fps=fps, cache=cache)
        self.seed = seed
        self.unreadable = unreadable
        self.pairs = [
            (row, caption) for row, video in enumerate(self.videos) for caption in video.captions
        ]
        if not self.pairs:
            raise ValueError(f"expected captions in split {split!r}, got none")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, asked = (0, key) if isinstance(key, int) else key
        index, generator = asked, generator_for(self.seed, epoch, asked)
        attempt = 0
        while True:
            row, caption = self.pairs[index]
            video = self.videos[row]
            if self.unreadable is None or video not in self.unreadable:
                try:
                    pixels = self._pixels(video, "random", generator)
                    return {"pixels": pixels, "caption": caption, "video": row}
                except ClipError as error:
                    if self.unreadable is None:
                        raise
                    self.unreadable.add(video, error)
            # Use a new generator: how much the failed read drew depends on the kind of damage.
            attempt += 1
            generator = generator_for(self.seed, epoch, asked, attempt)
            index = int(torch.randint(len(self.pairs), (), generator=generator))


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate items: "pixels" [batch, num_frames, 3, height, width], "videos" int64 [batch].

    If items have captions, the batch has the list "captions".
    """
    batch: dict[str, Any] = {
        # In a worker, default_collate stacks into shared memory, which saves a copy and keeps
        # glibc's heap from growing through fragmentation.
        "pixels": default_collate([item["pixels"] for item in items]),
        "videos": torch.tensor([item["video"] for item in items]),
    }
    if "caption" in items[0]:
        batch["captions"] = [item["caption"] for item in items]
    return batch
