"""Cases, their inputs and the tolerance of their results: what tests and benchmarks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenmix_ops.mixing import Mixing
from tokenmix_ops.plan import Plan
from tokenmix_ops.tolerance import FUSED, Arithmetic, Budget, error_budget, rms_error, rms_limit

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


def gather_and_sdpa(
    plan: Plan, scale: float | None = None, dtype: torch.dtype | None = None
) -> Attention:
    """What a user of PyTorch alone would write: index the keys, call its attention.

    Given inputs in float32 and a ``dtype``, attention computes in that one, and the parts of a
    token's gradients add up in float32. Raises ValueError for a gain where each token of a frame
    has keys of its own.
    """
    if plan.rows == "token" and plan.scales_logits:
        raise ValueError("expected keys that the tokens of a frame share, or no gain")

    def attend(queries: Tensor, k: Tensor, v: Tensor, row: int, cross: Tensor) -> Tensor:
        index = plan.key_index[row].long()
        # Selected keys lie as the plan lists them.
        keys, values = (x if x.dim() == 4 else x.flatten(1, 2)[:, index] for x in (k, v))
        queries, keys, values = (x.to(dtype or x.dtype) for x in (queries, keys, values))
        keys = torch.where(cross[:, None, None], keys * plan.cross_frame_gain, keys)
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
        return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if plan.rows != "token":
            rows = [0 if plan.rows == "shared" else t for t in range(q.shape[1])]
            ways = [
                attend(q[:, t], k, v, row, plan.is_cross_frame[t]) for t, row in enumerate(rows)
            ]
            return torch.stack(ways, dim=1)
        nowhere = torch.zeros_like(plan.is_cross_frame[0, 0])
        tokens = range(q.shape[2])
        return torch.stack([attend(q[:, :, s], k, v, s, nowhere) for s in tokens], dim=2)

    return attention


@dataclass(frozen=True)
class Expected:
    """What a call should give, by name, and the RMS error that each tensor may have."""

    budgets: Mapping[str, Budget]
    rms_limits: Mapping[str, float]

    def fault(self, found: Mapping[str, Tensor], dtype: torch.dtype) -> str | None:
        """What is wrong with a result, which may lack gradients; None if nothing is."""
        for name, tensor in found.items():
            exact, limit = self.budgets[name].exact, self.budgets[name].limit
            if not limit.isfinite().all():
                return f"{name}: these inputs are beyond what the rule covers"
            if tensor.shape != exact.shape or tensor.dtype != dtype:
                return (
                    f"{name}: expected {dtype} {list(exact.shape)}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
            error = (tensor.double() - exact).abs()
            if wrong := int((~(error <= limit)).sum()):
                worst = float((error / limit).nan_to_num(nan=math.inf).amax())
                return (
                    f"{name}: {wrong} of {error.numel()} elements too far off, the worst by "
                    f"{worst:.3g} times its limit"
                )
            rms, allowed = rms_error(tensor, exact), self.rms_limits[name]
            if not rms <= allowed:
                return f"{name}: RMS error {rms:.3g}, allowed {allowed:.3g}"
        return None


def expected(
    inputs: tuple[Tensor, ...],
    output_grad: Tensor,
    plan: Plan,
    arithmetic: Arithmetic = FUSED,
    scale: float | None = None,
    plain: Attention | None = None,
) -> Expected:
    """`Expected` of query, key and value; ``plain`` is PyTorch's way, `gather_and_sdpa` if None."""
    query, key, value = (t.detach() for t in inputs)
    budgets = error_budget(query, key, value, output_grad, plan, scale, arithmetic)
    dtype = query.dtype
    if dtype == torch.float64:
        # The exact values are rounded like any others.
        doubled = {name: replace(b, limit=2 * b.limit) for name, b in budgets.items()}
        return Expected(doubled, dict.fromkeys(budgets, math.inf))
    plain = plain or gather_and_sdpa(plan, scale, dtype)
    found = output_and_gradients(plain, (query.float(), key.float(), value.float()), output_grad)
    limits = {
        name: rms_limit(budget.exact, found[name].to(dtype), budget.mean_square)
        for name, budget in budgets.items()
    }
    return Expected(budgets, limits)
