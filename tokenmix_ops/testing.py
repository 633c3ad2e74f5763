"""Cases and their inputs, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenmix_ops.mixing import Mixing
from tokenmix_ops.plan import Plan

Layout = Literal["contiguous", "packed", "padded", "heads_first", "selected"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call of the operator: a mixing, a shape, and the memory layout of its tensors.

    ``layout``: "packed" are views of one qkv projection, "padded" has gaps between tokens,
    "heads_first" is [batch, num_heads, ...] in memory, "selected" passes only the selected keys.
    """

    mixing: Mixing
    batch: int = 2
    num_frames: int = 4
    num_tokens: int = 10
    num_prefix_tokens: int = 1
    num_heads: int = 3
    head_dim: int = 16
    layout: Layout = "contiguous"

    @property
    def plan(self) -> Plan:
        return self.plan_on("cpu")

    def plan_on(self, device: torch.device | str) -> Plan:
        return self.mixing.plan(self.num_frames, self.num_tokens, self.num_prefix_tokens, device)

    def inputs(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns query, key and value, drawn from a standard normal, which require gradients."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.num_frames, self.num_tokens, self.num_heads, self.head_dim)

        def normal(*sizes: int) -> Tensor:
            numbers = torch.randn(sizes, generator=generator, dtype=torch.float64)
            return numbers.to(dtype=dtype, device=device)

        if self.layout == "packed":
            packed = normal(*shape[:3], 3, *shape[3:])
            tensors = packed.unbind(3)
        elif self.layout == "padded":
            tensors = tuple(
                normal(*shape[:2], shape[2] + 3, shape[3], shape[4] + 8)[
                    :, :, : shape[2], :, : shape[4]
                ]
                for _ in range(3)
            )
        elif self.layout == "heads_first":
            tensors = tuple(
                normal(shape[0], shape[3], *shape[1:3], shape[4]).movedim(1, 3) for _ in range(3)
            )
        else:
            tensors = tuple(normal(*shape) for _ in range(3))
        if self.layout == "selected":
            index = self.plan_on(device).key_index[0]
            query, *full = tensors
            tensors = (query, *(t.flatten(1, 2).index_select(1, index) for t in full))
        query, key, value = (t.detach().requires_grad_() for t in tensors)
        return query, key, value

    def __str__(self) -> str:
        shape = f"B{self.batch}T{self.num_frames}S{self.num_tokens}P{self.num_prefix_tokens}"
        shape += f"H{self.num_heads}D{self.head_dim}"
        return f"{self.mixing!r}-{shape}-{self.layout}".replace("Mixing.", "")


_TABLE = Mixing.from_index(
    [[0, 5, 9, 17, 31], [1, 12, 12, 3, 39], [30, 20, 10, 0, 7], [8, 8, 8, 1, 2]],
    [[-1, 0, 0, 1, 3], [0, 1, 1, 0, -1], [3, 2, 1, 0, -1], [0, 0, 0, -1, 0]],
    cross_frame_gain=0.5,
)

MIXINGS: tuple[Mixing, ...] = (
    Mixing.paper(),
    Mixing.paper(cross_frame_gain=0.7),
    Mixing.released(),
    Mixing.released(cross_frame_gain=1.0),
    Mixing.released(cross_frame_gain=0.0),
    Mixing.spatial(),
    Mixing.adjacent((-1, 0, 1)),
    Mixing.adjacent((-2, 1), wrap=True, cross_frame_gain=0.8),
    Mixing.temporal(),
    Mixing.temporal(cross_frame_gain=1.5),
    Mixing.joint(),
    Mixing.joint(cross_frame_gain=0.8),
    Mixing.from_index([3, 38, 12, 12, 0, 21]),
    _TABLE,
)


def _cases() -> list[Case]:
    cases = [Case(mixing) for mixing in MIXINGS]
    released, adjacent = Mixing.released(), Mixing.adjacent((-1, 0, 1))
    for mixing in (released, adjacent):
        cases += [Case(mixing, layout=layout) for layout in ("packed", "padded", "heads_first")]
    cases += [
        Case(released, layout="selected"),
        Case(Mixing.paper(), layout="selected"),
        Case(released, num_frames=1),
        Case(released, num_frames=8, num_tokens=3),
        Case(released, num_frames=5, num_tokens=50, batch=1),
        Case(released, num_prefix_tokens=0),
        Case(released, num_prefix_tokens=5),
        Case(released, num_heads=1, head_dim=1),
        Case(released, num_tokens=2, head_dim=7),
        Case(released, num_frames=8, num_tokens=197, num_heads=1, head_dim=64, batch=1),
        Case(adjacent, num_prefix_tokens=0, num_frames=2),
        Case(
            adjacent,
            num_frames=8,
            num_tokens=50,
            num_heads=2,
            head_dim=32,
            batch=1,
            layout="packed",
        ),
        Case(Mixing.temporal(), num_tokens=5, num_prefix_tokens=0, layout="packed"),
    ]
    return cases


CASES: list[Case] = _cases()
"""Every mixing, and the shapes and layouts that tend to break implementations."""


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference from a float64 result; infinite if ``actual`` holds a NaN."""
    difference = (actual.detach().to(exact) - exact.detach()).abs()
    return float(difference.nan_to_num(nan=float("inf")).amax()) if difference.numel() else 0.0


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def output_and_gradients(
    attention: Attention, inputs: tuple[Tensor, ...], output_grad: Tensor
) -> dict[str, Tensor]:
    """Returns the output of ``attention`` and the gradients of its three inputs, by name."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    output = attention(*leaves)
    grads = torch.autograd.grad(output, leaves, output_grad.to(output))
    names = ("output", "query gradient", "key gradient", "value gradient")
    return dict(zip(names, (output.detach(), *grads), strict=True))
