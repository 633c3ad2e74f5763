"""From a manifest to the items and batches that models are trained and evaluated on."""

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
    """The videos of a split, one item each, with frames chosen uniformly, at ``fps`` if given.

    Item ``row`` is {"pixels": [num_frames, 3, height, width] float32, normalised as
    `normalize_clip` does, "video": row}, whether or not decoded frames are kept in ``cache``.
    Raises ValueError if the split has no video, or for numbers out of range; reading an item
    raises ClipError, which names the path, if it cannot be read.
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
    """The captions of a split, one item each, with frames of the caption's video.

    Item ``index``, or (epoch, index) as `EpochBatches` gives it, is {"pixels": [num_frames, 3,
    height, width] float32, normalised, "caption": str, "video": row of the video in
    ``videos``}. Frames are drawn at random: they depend on seed, epoch and index only, not on
    workers or processes. Where a video cannot be read it is added to ``unreadable``, and another
    caption, drawn likewise, stands in. Raises ValueError if the split has no caption; reading an
    item raises ClipError, which names the path, if there is no such list, and ValueError if the
    list gets longer than it may.
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
            raise ValueError(f"split is {split!r}, whose videos have no captions")

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
            # One of its own: how much the other was drawn from depends on what is wrong.
            attempt += 1
            generator = generator_for(self.seed, epoch, asked, attempt)
            index = int(torch.randint(len(self.pairs), (), generator=generator))


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items: "pixels" [batch, num_frames, 3, height, width], "videos" int64 [batch].

    Where items have captions, these are the list "captions".
    """
    batch: dict[str, Any] = {
        # In a worker this stacks into shared memory, which saves a copy; and glibc's heap, in which
        # such copies leave holes that they do not fit in again, would grow.
        "pixels": default_collate([item["pixels"] for item in items]),
        "videos": torch.tensor([item["video"] for item in items]),
    }
    if "caption" in items[0]:
        batch["captions"] = [item["caption"] for item in items]
    return batch
