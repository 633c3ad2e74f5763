"""Deterministic batches: seed and epoch alone determine which items go into which batch."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import torch
from torch.utils.data import Sampler


def generator_for(*numbers: int) -> torch.Generator:
    """Seed a generator from the given numbers and their order."""
    digest = blake2b(repr(numbers).encode(), digest_size=8).digest()
    # PyTorch's seeds are signed 64-bit integers.
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """A ``batch_sampler`` for this process's batches of one epoch, lists of (epoch, index).

    Shuffles all ``length`` items in every epoch. ``world`` processes with ``batch_size`` each see
    the same global batches as one process with ``world * batch_size``: process ``rank`` gets the
    rank-th part of each. Drops the last, incomplete global batch. The epoch travels with the index,
    so that it reaches persistent workers. Raises ValueError if no global batch can be filled, or
    for numbers out of range.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        for name, value in (("batch_size", batch_size), ("world", world)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to {world - 1} for world={world}, got {rank}")
        if length < batch_size * world:
            raise ValueError(
                f"expected at least one batch of {batch_size * world} items to train on "
                f"({world} processes with batch_size {batch_size}), got {length}: lower "
                "batch_size, or start fewer processes"
            )
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.start = 0

    @property
    def num_batches(self) -> int:
        """Number of batches in a full epoch."""
        return self.length // (self.batch_size * self.world)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Select the epoch for the next iteration, which skips its first ``start`` batches.

        Raises ValueError if the epoch has fewer batches.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        if not 0 <= start <= self.num_batches:
            raise ValueError(
                f"start must be from 0 to the epoch's {self.num_batches} batches, got {start}"
            )
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Number of batches in the next iteration."""
        return self.num_batches - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.length, generator=generator_for(self.seed, self.epoch))
        batches = order[: self.num_batches * self.world * self.batch_size]
        own = batches.view(self.num_batches, self.world, self.batch_size)[self.start :, self.rank]
        epoch = self.epoch
        # Bind the epoch now, so that a later set_epoch does not affect this iterator.
        return ([(epoch, index) for index in batch] for batch in own.tolist())
