"""The batches of a whole training, from any update on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tokenmix_ops.video.data.sampling import EpochBatches
from tokenmix_ops.video.data.workers import OutliveSignals
from tokenmix_ops.video.engine.hyperparameters import Training


class TrainingBatches:
    """A ``batch_sampler`` over all epochs: lists of (epoch, index), ``accumulation`` an update.

    An update's samples are one batch of ``EpochBatches``, so that they are the same however they
    are cut into processes and accumulated batches. Raises ValueError if there are too few.
    """

    def __init__(self, length: int, settings: Training, *, rank: int = 0, world: int = 1) -> None:
        of_update = settings.batch_size * settings.accumulation
        if length < of_update * world:
            raise ValueError(
                f"the training set has {length} captions, fewer than one update's "
                f"{of_update * world} (processes {world} x --batch-size {settings.batch_size} x "
                f"--accumulation {settings.accumulation}): lower --batch-size or --accumulation"
            )
        self.epochs = EpochBatches(length, of_update, seed=settings.seed, rank=rank, world=world)
        self.batch_size = settings.batch_size
        self.per_epoch = self.epochs.num_batches
        self.total = min(settings.epochs * self.per_epoch, settings.max_steps or 2**63)
        self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, position = divmod(self.start, self.per_epoch)
        while epoch * self.per_epoch < self.total:
            self.epochs.set_epoch(epoch, position)
            for samples in self.epochs:
                for first in range(0, len(samples), self.batch_size):
                    yield samples[first : first + self.batch_size]
            epoch, position = epoch + 1, 0


def loader_of(
    dataset: Dataset[Any],
    batches: TrainingBatches,
    settings: Training,
    collate: Callable[[list[Any]], Any] | None,
    device: torch.device,
    workers: OutliveSignals,
) -> DataLoader[Any]:
    """A loader of the training's remaining batches; ``dataset`` is asked for (epoch, index)."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=settings.workers,
        worker_init_fn=workers,
        pin_memory=device.type == "cuda",
        # The loader draws a seed for its workers: not from the generator of the model's dropout.
        generator=torch.Generator().manual_seed(settings.seed),
    )
