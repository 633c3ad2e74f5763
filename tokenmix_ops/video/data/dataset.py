"""From a manifest to the items and batches that models are trained and evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenmix_ops.video.data.clips import frame_indices, normalize_clip, read_clip
from tokenmix_ops.video.data.manifest import Manifest, Video
from tokenmix_ops.video.data.sampling import generator_for


class Clips(Dataset[dict[str, Any]]):
    """The videos of a split, one item each, with frames chosen uniformly.

    Item ``row`` is {"pixels": [num_frames, 3, height, width] float32, normalised as
    `normalize_clip` does, "video": row}. Raises ValueError if the split has no video; reading an
    item raises ClipError, which names the path, if it cannot be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        num_frames: int = 8,
        size: int | tuple[int, int] = 224,
    ) -> None:
        frame_indices(1, num_frames)
        self.manifest = manifest
        self.videos = manifest.of_split(split)
        self.num_frames = num_frames
        self.size = size

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixels": self._pixels(self.videos[row], "uniform", None), "video": row}

    def _pixels(self, video: Video, sampling: str, generator: torch.Generator | None) -> Tensor:
        clip = read_clip(
            self.manifest.path_of(video),
            self.num_frames,
            self.size,
            sampling,
            video.start,
            video.end,
            generator,
        )
        return normalize_clip(clip)


class CaptionedClips(Clips):
    """The captions of a split, one item each, with frames of the caption's video.

    Item ``index``, or (epoch, index) as `EpochBatches` gives it, is {"pixels": [num_frames, 3,
    height, width] float32, normalised, "caption": str, "video": row of the video in
    ``videos``}. Frames are drawn at random: they depend on seed, epoch and index only, not on
    workers or processes. Raises ValueError if the split has no caption; reading an item raises
    ClipError, which names the path, if it cannot be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        num_frames: int = 8,
        size: int | tuple[int, int] = 224,
        seed: int = 0,
    ) -> None:
        super().__init__(manifest, split, num_frames=num_frames, size=size)
        self.seed = seed
        self.pairs = [
            (row, caption) for row, video in enumerate(self.videos) for caption in video.captions
        ]
        if not self.pairs:
            raise ValueError(f"split is {split!r}, whose videos have no captions")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = (0, key) if isinstance(key, int) else key
        row, caption = self.pairs[index]
        generator = generator_for(self.seed, epoch, index)
        pixels = self._pixels(self.videos[row], "random", generator)
        return {"pixels": pixels, "caption": caption, "video": row}


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items: "pixels" [batch, num_frames, 3, height, width], "videos" int64 [batch].

    Where items have captions, these are the list "captions".
    """
    batch: dict[str, Any] = {
        "pixels": torch.stack([item["pixels"] for item in items]),
        "videos": torch.tensor([item["video"] for item in items]),
    }
    if "caption" in items[0]:
        batch["captions"] = [item["caption"] for item in items]
    return batch
