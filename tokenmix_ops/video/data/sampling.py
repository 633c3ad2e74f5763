"""Which items come in which batch: from the seed and the epoch alone, whoever asks."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import torch
from torch.utils.data import Sampler


def generator_for(*numbers: int) -> torch.Generator:
    """A generator whose draws depend on the given numbers, and on their order, only."""
    digest = blake2b(repr(numbers).encode(), digest_size=8).digest()
    # PyTorch takes seeds of a signed 64-bit integer.
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """This process's batches of one epoch, each a list of (epoch, index); a ``batch_sampler``.

    Every epoch shuffles all ``length`` items anew. ``world`` processes with ``batch_size`` each
    see together, batch for batch, what one with ``world * batch_size`` sees: process ``rank`` has
    the rank-th part of every global batch. What remains at the end of an epoch and does not fill
    a global batch is left out. The epoch travels with the index, so that it reaches workers that
    outlive an epoch. Raises ValueError if no global batch can be filled, or for numbers out of
    range.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        for name, value in (("batch_size", batch_size), ("world", world)):
            if value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}, it must be from 0 to {world - 1}, for {world} ranks")
        if length < batch_size * world:
            raise ValueError(
                f"there are {length} items to train on, fewer than one batch of "
                f"{batch_size * world} ({world} processes with batch_size {batch_size}): lower "
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
        """Batches of a whole epoch."""
        return self.length // (self.batch_size * self.world)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose what the next iteration gives: an epoch, without its first ``start`` batches.

        Raises ValueError if the epoch has not so many.
        """
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, it must be at least 0")
        if not 0 <= start <= self.num_batches:
            raise ValueError(
                f"start is {start}, it must be from 0 to the epoch's {self.num_batches} batches"
            )
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches that the next iteration gives."""
        return self.num_batches - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.length, generator=generator_for(self.seed, self.epoch))
        batches = order[: self.num_batches * self.world * self.batch_size]
        own = batches.view(self.num_batches, self.world, self.batch_size)[self.start :, self.rank]
        epoch = self.epoch
        # A generator expression: the epoch is the one at the call, whatever is set afterwards.
        return ([(epoch, index) for index in batch] for batch in own.tolist())
