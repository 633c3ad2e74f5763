"""A global batch whose rows are spread over the processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class GlobalBatch:
    """How many rows of a batch each process holds; one process holds all if there is one.

    ``lengths`` are those of each process's texts.
    """

    sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    rank: int

    @classmethod
    def around(cls, rows: int, length: int, device: torch.device) -> GlobalBatch:
        """The batch that this process has ``rows`` of, with texts of ``length`` tokens.

        With several processes it waits for all work on the device.
        """
        if not _several():
            return cls((rows,), (length,), 0)
        own = torch.tensor([rows, length], device=device)
        sizes, lengths = torch.stack(_all_gather(own), dim=1).tolist()
        return cls(tuple(sizes), tuple(lengths), dist.get_rank())

    @property
    def own(self) -> slice:
        """This process's rows among all."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    def gather(self, tensor: Tensor) -> Tensor:
        """[rows of this process, ...] to [rows of all, ...], without a gradient."""
        if len(self.sizes) == 1:
            return tensor.detach()
        return self._joined(_all_gather(self._evened(tensor.detach())))

    def gather_with_gradient(self, tensor: Tensor) -> Tensor:
        """`gather`; backward, each process gets the sum of all processes' gradients of its rows.

        All processes must go backward through it. Where gradients of parameters are then averaged
        over processes, the result is the gradient of the processes' mean loss.
        """
        if len(self.sizes) == 1:
            return tensor
        return self._joined(list(_Gather.apply(self._evened(tensor))))

    def _evened(self, tensor: Tensor) -> Tensor:
        """With as many rows as the process that has most, since collectives want equal shapes."""
        missing = max(self.sizes) - len(tensor)
        return pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing else tensor

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])


class _Gather(torch.autograd.Function):
    """torch.distributed.nn.functional.all_gather, which PyTorch has deprecated."""

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
