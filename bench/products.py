"""Plain matrix products that take turns with the operator: what a processor's arithmetic allows.

They are float32, in which the kernel computes whatever the tensors hold.
"""

from __future__ import annotations

import torch

from tokenmix_ops.plan import Plan
from tokenmix_ops.testing import Case
from tokenmix_ops.timing import Turn

WIDTH = 1024
"""Of the largest matrix on the right of `product`: wider ones run no faster."""


def yardsticks(case: Case, plan: Plan, of_pass: str, flops: float) -> dict[str, Turn]:
    """What takes turns with a pass of so many operations, named as in `bench.titles.PRODUCTS`."""
    found = {"product": product(flops)}
    if of_pass == "forward" and plan.rows != "token":
        found["own_products"] = own_products(case, plan)
    return found


def sizes(flops: float) -> tuple[int, int]:
    """Rows and width of a product [rows, width] × [width, width] of about so many operations: a
    cube, up to `WIDTH`."""
    width = max(1, min(WIDTH, round((flops / 2) ** (1 / 3))))
    return max(1, round(flops / (2 * width**2))), width


def product(flops: float) -> Turn:
    rows, width = sizes(flops)
    left, right = (_normal((n, width)) for n in (rows, width))
    output = left.new_empty((rows, width))
    return lambda number: lambda: torch.mm(left, right, out=output)


def own_products(case: Case, plan: Plan) -> Turn:
    """Of all queries with the keys that they share, and of the result with the values, head by
    head: the operator's own sizes, from memory in the best order, without a softmax."""
    groups = case.num_frames if plan.rows == "frame" else 1
    queries = case.num_frames // groups * case.num_tokens
    batch = case.batch * groups * case.num_heads
    query = _normal((batch, queries, case.head_dim))
    key, value = (_normal((batch, plan.num_keys, case.head_dim)) for _ in range(2))
    logits = query.new_empty((batch, queries, plan.num_keys))
    output = torch.empty_like(query)

    def run() -> None:
        torch.bmm(query, key.transpose(1, 2), out=logits)
        torch.bmm(logits, value, out=output)

    return lambda number: run


def _normal(shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator)
