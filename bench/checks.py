"""What a contender has to show before it is timed: that it computes the right result.

This project's own kernels are held to the computed tolerance; its bounds do not cover what peers
round, so these may be off by a few times what right ones are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

import tokenmix_ops as tm
from bench.passes import Contender, failure
from tokenmix_ops.plan import Plan
from tokenmix_ops.testing import Attention, expected, output_and_gradients
from tokenmix_ops.tolerance import FUSED, Arithmetic

LARGEST_ERROR = {
    torch.bfloat16: 1.5e-2,
    torch.float16: 2e-3,
    torch.float32: 1e-4,
    torch.float64: 1e-5,
}
"""Relative errors of outputs above which a peer computes something else: a few times those of right
ones, and far below that of a forgotten gain, or in float32 of TF32. Gradients may have twice as
much."""
BACKENDS = {"eager": Arithmetic(composed=True), "triton": FUSED}
"""What this project's backends may round."""


def relative_errors(actual: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """||actual - exact|| / ||exact|| by name; infinite if anything in ``actual`` is NaN."""
    found = {}
    for name, value in actual.items():
        difference = (value.detach().to(exact[name]) - exact[name]).norm() / exact[name].norm()
        found[name] = float(difference.nan_to_num(nan=float("inf")))
    return found


def fault(found: Mapping[str, float], dtype: torch.dtype) -> str | None:
    """What is wrong with a result that has these errors; None if nothing is."""
    for name, error in found.items():
        limit = LARGEST_ERROR[dtype] * (1 if name == "output" else 2)
        if not error <= limit:
            return f"wrong: the {name} has a relative error of {error:.1e}, more than {limit:.1e}"
    return None


def poison(*tensors: Tensor) -> None:
    """Leaves NaN in the memory that the next tensors of these sizes will probably get, so that what
    a contender does not write shows, and is not the right result of the one before."""
    filled = [torch.full_like(tensor, float("nan")) for tensor in tensors]
    del filled


def checked(
    contender: Contender,
    plan: Plan,
    dtype: torch.dtype,
    differentiates: bool = True,
    arithmetic: Arithmetic | None = None,
) -> tuple[dict[str, float], str | None, str | None]:
    """Relative errors of a contender's first and last video, and why it must not be timed: at all,
    or in backward passes.

    ``arithmetic`` is what one of our own kernels may round; None of a peer. Both are compared with
    float64, of those two videos alone.
    """
    inputs, output_grad = contender.sets[0], contender.output_grads[0]
    ends = [0, inputs[0].shape[0] - 1]
    of_ends, grad_of_ends = tuple(t[ends] for t in inputs), output_grad[ends]
    wanted = None
    if arithmetic is None:
        eager = partial(tm.token_mix_attention, mixing=plan, backend="eager")
        doubles = tuple(t.double() for t in of_ends)
        exact = output_and_gradients(eager, doubles, grad_of_ends.double())
    else:
        wanted = expected(of_ends, grad_of_ends, plan, arithmetic)
        exact = {name: budget.exact for name, budget in wanted.budgets.items()}
    found: dict[str, float] = {}

    def compare(run: Attention, grads: bool) -> str | None:
        poison(*inputs, *inputs)
        if grads:
            actual = output_and_gradients(run, inputs, output_grad)
        else:
            with torch.no_grad():
                actual = {"output": run(*inputs)}
        actual = {key: t[ends] for key, t in actual.items()}
        found.update(relative_errors(actual, exact))
        if wanted is None:
            return fault(found, dtype)
        wrong = wanted.fault(actual, dtype)
        return wrong and f"wrong: {wrong}"

    forward_fault = _verdict(partial(compare, contender.call, False))
    backward_fault = None
    if differentiates and not forward_fault:
        backward_fault = _verdict(partial(compare, contender.call, True))
    return found, forward_fault, backward_fault


def _verdict(check: Callable[[], str | None]) -> str | None:
    """What a check finds, or why it fails."""
    verdicts: list[str | None] = []
    return failure(lambda: verdicts.append(check())) or verdicts[0]
