"""The operator alone, against its peers: every shape that has a target, checked, then timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import tokenmix_ops as tm
from tokenmix_ops.bench.attention import SELECTED, contenders
from tokenmix_ops.bench.floor import Ceilings, floor, works
from tokenmix_ops.bench.measure import Clock
from tokenmix_ops.bench.passes import (
    PASSES,
    Contender,
    failure,
    fault,
    poison,
    race,
    relative_errors,
    rounded,
    rows_of,
)
from tokenmix_ops.bench.suites import Row
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.plan import Plan
from tokenmix_ops.testing import Attention, Case, output_and_gradients

MAIN = Case(Mixing.released(), batch=64, num_frames=8, num_tokens=197, num_heads=12, head_dim=64)
OFF = Mixing.released(cross_frame_gain=1.0)
ADJACENT = Mixing.adjacent((-1, 0, 1))


@dataclass(frozen=True)
class Shape:
    """One call of the operator that is measured, under a name that tables use."""

    name: str
    case: Case
    dtype: torch.dtype = torch.bfloat16
    passes: tuple[str, ...] = PASSES
    selected: bool = False
    """Also with keys that come already selected, for which kernels are compiled once more."""


# In the order of what matters, in case the time is not enough for all.
SHAPES = (
    Shape("main", MAIN, selected=True),
    Shape("main, gain off", replace(MAIN, mixing=OFF), selected=True),
    Shape("adjacent", replace(MAIN, mixing=ADJACENT)),
    Shape("S = 577, gain off", replace(MAIN, num_tokens=577, mixing=OFF)),
    Shape("S = 577", replace(MAIN, num_tokens=577)),
    Shape("B = 16", replace(MAIN, batch=16)),
    Shape("B = 1", replace(MAIN, batch=1), passes=("forward",)),
    Shape("B = 8", replace(MAIN, batch=8), passes=("forward",)),
    Shape("T = 16", replace(MAIN, num_frames=16)),
    Shape("H = 16", replace(MAIN, num_heads=16)),
    Shape("float16", MAIN, torch.float16),
    Shape("float32", MAIN, torch.float32),
)


def operator_rows(
    shape: Shape, ceilings: Ceilings, clock: Clock, device: str, seconds: float
) -> list[Row]:
    """Rows of one shape: every contender and pass, timed or with the reason why not.

    ``seconds`` is about how long each pass is timed; what compilers take comes on top.
    """
    # Compiled code is kept by the function that it came from, and only so many of each.
    torch.compiler.reset()
    case, plan = shape.case, shape.case.plan_on(device)
    itemsize = shape.dtype.itemsize
    facts = {
        "suite": "gpu",
        "part": "operator",
        "shape": shape.name,
        "mixing": repr(case.mixing),
        "batch": case.batch,
        "num_frames": case.num_frames,
        "num_tokens": case.num_tokens,
        "num_keys": plan.num_keys,
        "num_heads": case.num_heads,
        "head_dim": case.head_dim,
        "dtype": str(shape.dtype).removeprefix("torch."),
    }
    calls = contenders(plan, compiled=device != "cpu")
    if not shape.selected:
        calls["triton_selected"] = "measured at the main shape only"
    reasons = {name: why for name, why in calls.items() if isinstance(why, str)}
    sets = input_sets(case, shape.dtype, device)
    able: dict[str, Contender] = {}
    for name, call in calls.items():
        if not isinstance(call, str):
            of_name = [_selected(tensors, plan) for tensors in sets] if name in SELECTED else sets
            # The last tensor of a set is the gradient of the output.
            able[name] = Contender(call, [s[:3] for s in of_name], [s[3] for s in of_name])
    found: dict[str, dict[str, float]] = {}
    backward_reasons: dict[str, str] = {}
    differentiates = any(of_pass != "forward" for of_pass in shape.passes)
    for name, contender in able.items():
        found[name], forward_fault, backward_fault = checked(
            name, contender, plan, shape.dtype, differentiates
        )
        if forward_fault:
            reasons[name] = forward_fault
        elif backward_fault:
            backward_reasons[name] = backward_fault
    rows = []
    for of_pass in shape.passes:
        refused = {**reasons, **(backward_reasons if of_pass != "forward" else {})}
        result = race({n: c for n, c in able.items() if n not in refused}, of_pass, clock, seconds)
        floor_s = sum(floor(work, ceilings) for work in works(case, plan, itemsize)[of_pass])
        about = {**facts, "pass": of_pass, "floor_ms": rounded(1e3 * floor_s)}
        of_race = rows_of(result, about, list(calls), refused, found)
        for row in of_race:
            if of_pass == "backward" and row["contender"] == "triton" and "median_ms" in row:
                row["deterministic"] = _same_bits_again(able["triton"])
        rows += of_race
    return rows


def input_sets(case: Case, dtype: torch.dtype, device: str) -> list[tuple[Tensor, ...]]:
    """Sets of query, key, value and gradient of the output, together several times the L2 cache."""
    shape = (case.batch, case.num_frames, case.num_tokens, case.num_heads, case.head_dim)
    number = 2
    if device != "cpu":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        query_bytes = torch.Size(shape).numel() * dtype.itemsize
        number = min(max(2, -(-4 * cache // query_bytes)), 64)
    generator = torch.Generator(device).manual_seed(0)
    return [
        tuple(torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4))
        for _ in range(number)
    ]


def _selected(tensors: tuple[Tensor, ...], plan: Plan) -> tuple[Tensor, ...]:
    query, key, value, output_grad = tensors
    key, value = (t.flatten(1, 2).index_select(1, plan.key_index[0]) for t in (key, value))
    return query, key, value, output_grad


def _same_bits_again(contender: Contender) -> bool:
    """Whether a second backward pass over the same inputs gives the same bits."""
    inputs, output_grad = contender.sets[0], contender.output_grads[0]
    first, second = (output_and_gradients(contender.call, inputs, output_grad) for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


def checked(
    name: str, contender: Contender, plan: Plan, dtype: torch.dtype, differentiates: bool
) -> tuple[dict[str, float], str | None, str | None]:
    """Relative errors of a contender's first and last video, and why it must not be timed: at all,
    or in backward passes.

    What is expected is the eager backend's result in float64, of those two videos alone.
    """
    inputs, output_grad = contender.sets[0], contender.output_grads[0]
    if name == "spatial_sdpa":
        plan = Mixing.spatial().plan(
            plan.num_frames, plan.num_tokens, plan.num_prefix_tokens, inputs[0].device
        )
    ends = [0, inputs[0].shape[0] - 1]
    expected = partial(tm.token_mix_attention, mixing=plan, backend="eager")
    doubles = tuple(t[ends].double() for t in inputs)
    exact = output_and_gradients(expected, doubles, output_grad[ends].double())
    found: dict[str, float] = {}

    def compare(run: Attention, grads: bool) -> None:
        poison(*inputs, *inputs)
        if grads:
            actual = output_and_gradients(run, inputs, output_grad)
        else:
            with torch.no_grad():
                actual = {"output": run(*inputs)}
        found.update(relative_errors({key: t[ends] for key, t in actual.items()}, exact))

    forward_fault = failure(lambda: compare(contender.call, False)) or fault(found, dtype)
    backward_fault = None
    if differentiates and not forward_fault:
        backward_fault = failure(lambda: compare(contender.call, True)) or fault(found, dtype)
    return found, forward_fault, backward_fault
