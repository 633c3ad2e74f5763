"""A global batch, sharded by rows over the processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class GlobalBatch:
    """The layout of a global batch: rows (``sizes``) and text lengths (``lengths``) by rank."""

    sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    rank: int

    @classmethod
    def around(cls, rows: int, length: int, device: torch.device) -> GlobalBatch:
        """Build the layout from this process's ``rows`` and text ``length`` in tokens.

        Synchronises with the device if there are several processes.
        """
        if not _several():
            return cls((rows,), (length,), 0)
        own = torch.tensor([rows, length], device=device)
        sizes, lengths = torch.stack(_all_gather(own), dim=1).tolist()
        return cls(tuple(sizes), tuple(lengths), dist.get_rank())

    @property
    def own(self) -> slice:
        """The slice of this process's rows in the global batch."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    def gather(self, tensor: Tensor) -> Tensor:
        """Gather [own rows, ...] into [all rows, ...], without gradients."""
        if len(self.sizes) == 1:
            return tensor.detach()
        return self._joined(_all_gather(self._evened(tensor.detach())))

    def gather_with_gradient(self, tensor: Tensor) -> Tensor:
        """Like `gather`; the backward pass sums each row's gradient over all processes.

        All processes must run the backward pass. If parameter gradients are then averaged over
        processes, the result is the gradient of the mean loss.
        """
        if len(self.sizes) == 1:
            return tensor
        return self._joined(list(_Gather.apply(self._evened(tensor))))

    def _evened(self, tensor: Tensor) -> Tensor:
        """Pad to the largest process's number of rows, because collectives need equal shapes."""
        missing = max(self.sizes) - len(tensor)
        return pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing else tensor

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])


class _Gather(torch.autograd.Function):
    """Replaces torch.distributed.nn.functional.all_gather, which PyTorch has deprecated."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> tuple[Tensor, ...]:
        return tuple(_all_gather(tensor))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        own = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter(own, [grad.contiguous() for grad in grads])
        return own


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_gather(tensor: Tensor) -> list[Tensor]:
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts
