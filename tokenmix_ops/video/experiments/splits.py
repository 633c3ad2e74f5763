"""The videos of a split, shared out among the processes for an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset

from tokenmix_ops.video.data.dataset import Clips, collate
from tokenmix_ops.video.data.manifest import Manifest
from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.experiments.data import open_cache
from tokenmix_ops.video.experiments.settings import Captioning, Retrieval


def split_clips(
    manifest: Manifest,
    split: str,
    encoder: VideoEncoder,
    experiment: Captioning | Retrieval,
    accelerator: Accelerator,
) -> tuple[Clips, DataLoader[dict[str, Any]]]:
    """All clips of a split as an encoder takes them, and batches of this process's share."""
    clips = Clips(
        manifest,
        split,
        num_frames=encoder.num_frames,
        size=encoder.image_size,
        fps=experiment.videos.fps,
        cache=open_cache(experiment.videos),
    )
    own = range(accelerator.process_index, len(clips), accelerator.num_processes)
    loader: DataLoader[dict[str, Any]] = DataLoader(
        Subset(clips, own),
        batch_size=experiment.training.batch_size,
        num_workers=experiment.training.workers,
        collate_fn=collate,
        # A generator of its own: PyTorch's is the model's.
        generator=torch.Generator(),
    )
    return clips, loader
