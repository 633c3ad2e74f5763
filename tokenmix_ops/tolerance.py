"""Error tolerances derived from the arithmetic, never from one measured run.

There are two independent checks against float64. The error of no element may exceed the sum that
the roundings of its computation can reach (`Budget.limit`), and the root mean square (RMS) of a
tensor's errors may be at most twice that of plain PyTorch (`rms_limit`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmix_ops.plan import Plan

CONFIDENCE = 6.0
"""Allowed error of a sum, in standard deviations of its roundings; one sum in 10^8 exceeds it."""

DIVISION_ULP = 2.0
"""Largest error of a division in float32, in units in the last place, as NVIDIA states it for
``div.full.f32``."""

MEAN_SQUARE = 0.18
"""Mean square of a relative rounding error, in squared unit roundoffs: a third just above a power
of two, decreasing towards the next, weighted by the distribution of the magnitudes of products."""


@dataclass(frozen=True)
class Arithmetic:
    """What a computation may round besides sums and products in float32 (float64 for float64).

    A fused computation rounds to the dtype of its inputs its results, and the softmax weights and
    logit gradients that enter a product. One ``composed`` of PyTorch operators also rounds keys
    that carry the gain, and each row's part of a key or value gradient.

    Args:
        composed: whether these extra intermediate tensors exist.
        exponential_ulp: largest error of the exponential, in units in the last place of the sums'
            dtype. NVIDIA states 2 for ``ex2.approx.f32``.
    """

    composed: bool = False
    exponential_ulp: float = 2.0


FUSED = Arithmetic()


@dataclass(frozen=True)
class Budget:
    """The exact float64 value of a tensor, and how much rounding may change it.

    ``limit`` is the largest error of each element, ``mean_square`` the average squared error of
    the tensor if roundings are independent and uniform.
    """

    exact: Tensor
    limit: Tensor
    mean_square: float


def rms_error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square difference from a float64 result; infinite if ``actual`` holds a NaN."""
    if not exact.numel():
        return 0.0
    mean_square = float((actual.detach().to(exact) - exact.detach()).square().mean())
    return math.inf if math.isnan(mean_square) else math.sqrt(mean_square)


def rms_limit(exact: Tensor, plain: Tensor, mean_square: float = 0.0) -> float:
    """Largest RMS error allowed: twice that of ``plain``, PyTorch's result in the same dtype.

    If ``plain`` happens to be more accurate than average rounding, the expected error counts
    instead: `Budget.mean_square`, or that of one rounding of the result.
    """
    rounding = torch.finfo(plain.dtype).eps / 2
    mean = float(exact.detach().square().mean()) if exact.numel() else 0.0
    one_rounding = rounding * math.sqrt(MEAN_SQUARE * mean)
    return 2 * max(rms_error(plain, exact), one_rounding, math.sqrt(mean_square))


def growth(terms: int) -> float:
    """Bound on the error of a sum of ``terms`` numbers, in roundings of its size, in any order.

    Source: Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci.
    Comput. 41 (2019).
    """
    return min(float(terms), CONFIDENCE * math.sqrt(terms))


def error_budget(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output_grad: Tensor,
    plan: Plan,
    scale: float | None = None,
    arithmetic: Arithmetic = FUSED,
) -> dict[str, Budget]:
    """Budgets of "output", "query gradient", "key gradient" and "value gradient".

    Valid for inputs whose products neither overflow nor underflow the dtype of the sums.

    Args:
        query, output_grad: [batch, num_frames, num_queries, num_heads, head_dim].
        key, value: [batch, num_frames, num_tokens, num_heads, head_dim], or the selected ones as
            [batch, num_keys, num_heads, head_dim].
        plan: plan of the call, on the device of the tensors.
        scale: factor of the logits, head_dim**-0.5 unless given.
        arithmetic: what the computation may round.
    """
    rounding = _Rounding.of(query.dtype, arithmetic)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    index = plan.key_index.long()
    if key.dim() == 4:
        index = torch.arange(plan.num_keys, device=key.device)[None]
    queries, grads = query.detach().double(), output_grad.detach().double()
    keys, values = (t.detach().double().reshape(len(t), -1, *t.shape[-2:]) for t in (key, value))
    # Maximum number of rows that name one token; each contributes to its gradient.
    uses = int(torch.bincount(index.flatten(), minlength=1).amax())
    if plan.rows == "shared":
        uses *= plan.num_frames
    output, query_grad = _Tracked.zeros(queries), _Tracked.zeros(queries)
    key_grad, value_grad = _Tracked.zeros(keys), _Tracked.zeros(keys)
    for place, row, gain in _groups(plan, query.shape[2]):
        q, do = queries[place], grads[place]
        k, v = keys[:, index[row]], values[:, index[row]]
        gained = rounding.stored if arithmetic.composed and plan.scales_logits else 0.0
        sums = _Sums(rounding, gained, q.shape[1] * uses)
        results = sums.attention(q, k, v, do, gain * scale)
        for total, part in zip((output, query_grad), results[:2], strict=True):
            total.set(place, part)
        for total, part in zip((key_grad, value_grad), results[2:], strict=True):
            if arithmetic.composed:
                # Stored, then summed in the same dtype, with one rounding per row.
                limit = part.limit + growth(uses) * rounding.stored * part.exact.abs()
                part = rounding.store(_Tracked(part.exact, limit, part.variance))
            total.add_rows(index[row], part)
    for total in (key_grad, value_grad):
        # Sums over rows: for terms of one sign, the squared partial sums add up to a third.
        total.variance.add_(MEAN_SQUARE * rounding.summed**2 * uses / 3 * total.exact.square())
    names = ("output", "query gradient", "key gradient", "value gradient")
    found = (output, query_grad, rounding.store(key_grad), rounding.store(value_grad))
    shapes = (query.shape, query.shape, key.shape, value.shape)
    return {
        name: tracked.budget(shape)
        for name, tracked, shape in zip(names, found, shapes, strict=True)
    }


def _groups(plan: Plan, num_queries: int) -> Iterator[tuple[tuple[slice | int, ...], int, Tensor]]:
    """Yields the index of each group of queries, its row of keys, and the gain of each logit."""
    every = slice(None)
    for i in range(num_queries if plan.rows == "token" else plan.num_frames):
        cross = plan.is_cross_frame[i]
        gain = torch.ones_like(cross, dtype=torch.float64).masked_fill(cross, plan.cross_frame_gain)
        place = (every, every, i) if plan.rows == "token" else (every, i)
        yield place, 0 if plan.rows == "shared" else i, gain.reshape(-1, plan.num_keys)


@dataclass(frozen=True)
class _Tracked:
    """A float64 tensor with the largest errors of its computation and their variances."""

    exact: Tensor
    limit: Tensor
    variance: Tensor

    @classmethod
    def zeros(cls, like: Tensor) -> _Tracked:
        return cls(*(torch.zeros_like(like) for _ in range(3)))

    def set(self, place: tuple[slice | int, ...], part: _Tracked) -> None:
        self.exact[place], self.limit[place] = part.exact, part.limit
        self.variance[place] = part.variance

    def add_rows(self, rows: Tensor, part: _Tracked) -> None:
        self.exact.index_add_(1, rows, part.exact)
        self.limit.index_add_(1, rows, part.limit)
        # The errors of a token are the same in all slots of a row, so they add up linearly.
        deviation = torch.zeros_like(self.variance).index_add_(1, rows, part.variance.sqrt())
        self.variance.add_(deviation.square())

    def budget(self, shape: torch.Size) -> Budget:
        mean_square = float(self.variance.mean()) if self.variance.numel() else 0.0
        return Budget(self.exact.view(shape), self.limit.view(shape), mean_square)


@dataclass(frozen=True)
class _Rounding:
    """Relative errors of storing, of one step of a sum and of the exponential, and the absolute
    errors of storing and of the exponential near underflow."""

    stored: float
    stored_underflow: float
    summed: float
    exponential: float
    exponential_underflow: float

    @classmethod
    def of(cls, dtype: torch.dtype, arithmetic: Arithmetic) -> _Rounding:
        storage, sums = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
        return cls(
            stored=storage.eps / 2,
            stored_underflow=storage.eps / 2 * storage.smallest_normal,
            summed=sums.eps / 2,
            exponential=arithmetic.exponential_ulp * sums.eps,
            exponential_underflow=sums.smallest_normal,
        )

    def store(self, x: _Tracked) -> _Tracked:
        """Rounds to the dtype of the inputs. Exact zeros stay zero."""
        inexact = (x.limit > 0) | (x.exact != 0)
        limit = x.limit + self.stored * (x.exact.abs() + x.limit) + self.stored_underflow * inexact
        variance = MEAN_SQUARE * self.stored**2 * x.exact.square()
        # Below the smallest normal number the error is uniform.
        variance = variance + self.stored_underflow**2 / 3 * inexact
        return _Tracked(x.exact, limit, x.variance + variance)


@dataclass(frozen=True)
class _Sums:
    """The formulas of attention and of its gradients, with their rounding errors.

    Variances assume independent roundings and partial sums that are random walks. In equations, b
    is the batch, n the queries, m the keys, h the heads and d head_dim.

    Args:
        gained: relative error of storing keys that carry the gain.
        num_uses: number of queries that contribute to the gradient of one key.
    """

    rounding: _Rounding
    gained: float
    num_uses: int

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, factor: Tensor
    ) -> tuple[_Tracked, _Tracked, _Tracked, _Tracked]:
        """Returns the output and the gradients of q, k and v; those of k and v are not stored yet.

        ``q``, ``do`` [b, n, h, d]; ``k``, ``v`` [b, m, h, d]; ``factor`` [n or 1, m] scales logits.
        """
        store = self.rounding.store
        head_dim, num_keys = q.shape[-1], k.shape[1]
        logits = self.product("bnhd,bmhd->bhnm", _exactly(q), k, head_dim, self.gained)
        weights = self.softmax(self.times(logits, factor))
        stored_weights = store(weights)
        output = store(self.product("bhnm,bmhd->bnhd", stored_weights, v, num_keys))
        slopes = self.product("bnhd,bmhd->bhnm", _exactly(do), v, head_dim)
        delta = self.product("bnhd,bnhd->bhn", output, do, head_dim)
        logit_grads = store(self.times(self.of_softmax(weights, slopes, delta), factor))
        query_grad = self.product("bhnm,bmhd->bnhd", logit_grads, k, num_keys, self.gained)
        # All slopes of a query share the error of its delta.
        of_delta = torch.einsum("bhnm,bmhd->bnhd", weights.exact * factor, k).square()
        variance = query_grad.variance + of_delta * delta.variance.transpose(1, 2)[..., None]
        query_grad = _Tracked(query_grad.exact, query_grad.limit, variance)
        key_grad = self.product("bhnm,bnhd->bmhd", logit_grads, q, self.num_uses)
        value_grad = self.product("bhnm,bnhd->bmhd", stored_weights, do, self.num_uses)
        return output, store(query_grad), key_grad, value_grad

    def mean_square(self, terms: int, stored: float = 0.0) -> float:
        """Mean square of a sum's relative error; as in a random walk, half its roundings count."""
        return MEAN_SQUARE * (self.rounding.summed**2 * terms / 2 + stored**2)

    def product(
        self, equation: str, x: _Tracked, y: Tensor, terms: int, y_error: float = 0.0
    ) -> _Tracked:
        """Sums of ``terms`` products; ``y_error`` is the relative error of ``y``, element-wise."""
        unit = self.rounding.summed

        def sums(left: Tensor, right: Tensor) -> Tensor:
            return torch.einsum(equation, left, right)

        size, squares = sums(x.exact.abs() + x.limit, y.abs()), sums(x.exact.square(), y.square())
        return _Tracked(
            sums(x.exact, y),
            sums(x.limit, y.abs()) + (unit * (growth(terms) + 1) + y_error) * size,
            sums(x.variance, y.square()) + self.mean_square(terms + 1, y_error) * squares,
        )

    def times(self, x: _Tracked, factor: Tensor) -> _Tracked:
        """Multiplies by exact factors; two roundings, because a factor may itself be a product."""
        unit = 2 * self.rounding.summed
        exact = x.exact * factor
        limit = x.limit * factor.abs() + unit * exact.abs()
        return _Tracked(
            exact, limit, x.variance * factor.square() + self.mean_square(4) * exact.square()
        )

    def softmax(self, logits: _Tracked) -> _Tracked:
        """Softmax over the last dimension, computed after subtracting the largest logit or lse.

        The relative error of a weight is the absolute error of its logit.
        """
        unit, exponential = self.rounding.summed, self.rounding.exponential
        weights = logits.exact.softmax(-1)
        num_keys = weights.shape[-1]
        largest = logits.exact.abs().amax(-1, keepdim=True)
        own = logits.limit + unit * (logits.exact.abs() + largest) + exponential
        # Of the sum, its logarithm, its reciprocal and the product with that.
        once = growth(num_keys) + 3 + 2 * DIVISION_ULP
        total = unit * (once + largest + math.log(num_keys))
        shared = (weights * own).sum(-1, keepdim=True) + total
        # Keeps expm1 from overflowing in float64; the error of a weight is at most 1 anyway.
        growth_of = torch.expm1((own + shared).clamp_max(100.0))
        limit = weights * growth_of + self.rounding.exponential_underflow * (1 + growth_of)
        relative = logits.variance + self.mean_square(2) * logits.exact.square()
        relative = relative + self.rounding.exponential**2 / 3
        farthest = torch.maximum(weights, 1 - weights) + 4 * unit
        return _Tracked(
            weights,
            torch.minimum(limit, farthest),
            torch.minimum(weights.square() * relative, farthest.square()),
        )

    def of_softmax(self, weights: _Tracked, slopes: _Tracked, delta: _Tracked) -> _Tracked:
        """Gradients of the logits: weights * (slopes - delta)."""
        unit = self.rounding.summed
        difference = slopes.exact - delta.exact.unsqueeze(-1)
        sizes = slopes.exact.abs() + delta.exact.abs().unsqueeze(-1)
        limit = slopes.limit + delta.limit.unsqueeze(-1) + unit * sizes
        variance = slopes.variance + delta.variance.unsqueeze(-1)
        variance = variance + self.mean_square(2) * sizes.square()
        exact = weights.exact * difference
        return _Tracked(
            exact,
            weights.limit * (difference.abs() + limit) + weights.exact * limit + unit * exact.abs(),
            weights.variance * difference.square() + weights.exact.square() * variance,
        )


def _exactly(x: Tensor) -> _Tracked:
    return _Tracked(x, *(torch.zeros((), dtype=x.dtype, device=x.device).expand_as(x),) * 2)
