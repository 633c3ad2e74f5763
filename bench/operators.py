"""The operator alone: its shapes against their peers, and the host's time of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tokenmix_ops as tm
from bench.floor import Ceilings, floor, works
from bench.graphs import REPLAY, replays
from bench.passes import (
    BACKENDS,
    PASSES,
    Begin,
    Contender,
    checked,
    failure,
    race,
    rows_of,
)
from bench.products import yardsticks
from bench.rows import Row
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.peers import SELECTED, operators
from tokenmix_ops.plan import Plan
from tokenmix_ops.testing import Case, output_and_gradients
from tokenmix_ops.timing import Clock, rounded

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
    """Those of `PASSES`, and `REPLAY`."""
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
    Shape("B = 1", replace(MAIN, batch=1), passes=("forward", REPLAY)),
    Shape("B = 8", replace(MAIN, batch=8), passes=("forward", REPLAY)),
    Shape("T = 16", replace(MAIN, num_frames=16)),
    Shape("H = 16", replace(MAIN, num_heads=16)),
    Shape("float16", MAIN, torch.float16),
    Shape("float32", MAIN, torch.float32),
)
CPU_MAIN = replace(MAIN, batch=2)
CPU_SHAPES = (
    Shape("main", CPU_MAIN, torch.float32, selected=True),
    Shape("main, gain off", replace(CPU_MAIN, mixing=OFF), torch.float32, selected=True),
    Shape("S = 577", replace(CPU_MAIN, num_tokens=577), torch.float32, PASSES[:2]),
    Shape(
        "S = 577, gain off",
        replace(CPU_MAIN, num_tokens=577, mixing=OFF),
        torch.float32,
        PASSES[:2],
    ),
    Shape("spatial", replace(CPU_MAIN, mixing=Mixing.spatial()), torch.float32),
    Shape("adjacent", replace(CPU_MAIN, mixing=ADJACENT), torch.float32),
    Shape("T = 16", replace(CPU_MAIN, num_frames=16), torch.float32, PASSES[:2]),
    Shape("bfloat16", CPU_MAIN),
    Shape("bfloat16, gain off", replace(CPU_MAIN, mixing=OFF)),
    Shape("B = 1, T = 8, S = 50", replace(CPU_MAIN, batch=1, num_tokens=50), torch.float32),
    Shape(
        "B = 1, T = 1, S = 50",
        replace(CPU_MAIN, batch=1, num_frames=1, num_tokens=50),
        torch.float32,
    ),
)

# Fewer than fit the queue of launches, or the host would wait for the device.
CALLS, REPEATS = 200, 15


def operator_rows(
    shape: Shape,
    ceilings: Ceilings | None,
    clock: Clock,
    device: str,
    seconds: float,
    rounds: int | None = None,
    kernel: str = "triton",
    refused: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> list[Row]:
    """Rows of one shape: every contender and pass, timed or with the reason why not.

    ``seconds`` is about how long each pass is timed, unless ``rounds`` is given; what compilers
    take comes on top. ``kernel`` is this project's backend that takes part beside the eager one;
    ``refused`` is that of `timed_passes`.
    """
    passes = timed_passes(shape, ceilings, clock, device, seconds, rounds, refused, kernel=kernel)
    return [row for rows in passes for row in rows]


def flex_fault(shape: Shape, threads: int) -> str | None:
    """Why FlexAttention, compiled for a CPU with so many threads, does not run at a shape.

    For a process of its own: with a table of gains and keys that are no multiple of its tile it has
    read what lies behind its tensors.
    """
    torch.set_num_threads(threads)
    call = operators(shape.case.plan, kernel="cpu")["flex"]
    assert not isinstance(call, str)
    with torch.no_grad():
        return failure(partial(call, *input_sets(shape.case, shape.dtype, "cpu")[0][:3]))


def timed_passes(
    shape: Shape,
    ceilings: Ceilings | None,
    clock: Clock,
    device: str,
    seconds: float,
    rounds: int | None = None,
    refused: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    begin: Begin = lambda contender, of_pass: None,
    kernel: str = "triton",
) -> Iterator[list[Row]]:
    """`operator_rows`, one pass after the other, in ``rounds`` if given.

    ``refused`` names contenders that must not run, with the pass and the reason: all of their
    passes if it is the forward one, else all others. ``begin`` is told who runs next. Without
    ``ceilings``, those of a CPU, matrix products take turns with the contenders.
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
        "num_prefix_tokens": case.num_prefix_tokens,
        "num_keys": plan.num_keys,
        "num_heads": case.num_heads,
        "head_dim": case.head_dim,
        "dtype": str(shape.dtype).removeprefix("torch."),
    }
    calls = operators(plan, compiled=device != "cpu" or kernel == "cpu", kernel=kernel)
    if not shape.selected:
        calls[f"{kernel}_selected"] = "measured at the main shape only"
    reasons = {name: why for name, why in calls.items() if isinstance(why, str)}
    reasons |= {name: why for name, (of_pass, why) in refused.items() if of_pass == "forward"}
    sets = input_sets(case, shape.dtype, device)
    able: dict[str, Contender] = {}
    for name, call in calls.items():
        if name not in reasons and not isinstance(call, str):
            of_name = [_selected(tensors, plan) for tensors in sets] if name in SELECTED else sets
            # The last tensor of a set is the gradient of the output.
            able[name] = Contender(call, [s[:3] for s in of_name], [s[3] for s in of_name])
    found: dict[str, dict[str, float]] = {}
    backward_reasons = {
        name: why for name, (of_pass, why) in refused.items() if of_pass != "forward"
    }
    differentiates = any(of_pass in PASSES[1:] for of_pass in shape.passes)
    for name, contender in able.items():
        own_frame = replace(case, mixing=Mixing.spatial())
        found[name], forward_fault, backward_fault = checked(
            contender,
            own_frame.plan_on(device) if name == "spatial_sdpa" else plan,
            shape.dtype,
            differentiates and name not in backward_reasons,
            BACKENDS.get(name.removesuffix("_selected")),
            partial(begin, name),
        )
        if forward_fault:
            reasons[name] = forward_fault
        elif backward_fault:
            backward_reasons[name] = backward_fault
    for of_pass in shape.passes:
        out = {**reasons, **(backward_reasons if of_pass != "forward" else {})}
        racers = {name: contender for name, contender in able.items() if name not in out}
        timed = of_pass
        if of_pass == REPLAY:
            racers, without_graph = replays(racers, begin=begin)
            out |= without_graph
            timed = "forward"
        todo = works(case, plan, itemsize)[timed]
        flops = sum(work.flops for work in todo)
        beside = {} if ceilings else yardsticks(case, plan, timed, flops)
        result = race(racers, timed, clock, seconds, rounds, _beginning(of_pass, begin), beside)
        if of_pass == REPLAY:
            # A graph owns its memory from its capture on; replays show none of it.
            result.extra_bytes.clear()
        about = {**facts, "pass": of_pass, "gflop": rounded(flops / 1e9)}
        if ceilings:
            about["floor_ms"] = rounded(1e3 * sum(floor(work, ceilings) for work in todo))
        of_race = rows_of(result, about, [*calls, *beside], out, found)
        for row in of_race:
            if of_pass == "backward" and row["contender"] == kernel and "median_ms" in row:
                row["deterministic"] = _same_bits_again(able[kernel])
        yield of_race


def _beginning(of_pass: str, begin: Begin) -> Begin:
    """Tells ``begin`` this pass, whichever is timed."""
    return lambda contender, _: begin(contender, of_pass)


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


def host_rows(clock: Clock, device: str, backend: str = "triton") -> list[Row]:
    """Microseconds of the host for each call, without and with autograd, and of SDPA's own.

    Nothing is subtracted: checks, the choice of backend, the plan, allocations, launches; on a CPU
    also the few operations of a tiny call.
    """
    shape, dtype = (1, 2, 5, 1, 64), torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    video = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3)]
    heads_first = [t.flatten(1, 2).transpose(1, 2) for t in video]
    mixing = Mixing.released()
    call = tm.token_mix_attention
    contenders: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        backend: (partial(call, mixing=mixing, backend=backend), video),
        "eager": (partial(call, mixing=mixing, backend="eager"), video),
        "sdpa": (scaled_dot_product_attention, heads_first),
    }
    rows: list[Row] = []
    for name, (run_once, tensors) in contenders.items():
        for of_pass, run in _ways(run_once, tensors).items():
            row: Row = {"suite": "gpu", "part": "host", "pass": of_pass, "contender": name}
            seconds: list[float] = []
            why = failure(partial(_repeat, run, clock, seconds))
            if why:
                row["reason"] = why
            else:
                row["median_us"] = rounded(1e6 * median(seconds))
                row["rounds_us"] = [rounded(1e6 * s) for s in seconds]
            rows.append(row)
    return rows


def _ways(call: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    """One call, by how much of autograd comes with it."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output_grad = torch.ones_like(leaves[0])

    def plain() -> object:
        with torch.no_grad():
            return call(*tensors)

    return {
        "no autograd": plain,
        "forward, with autograd": lambda: call(*leaves),
        "forward + backward": lambda: torch.autograd.grad(call(*leaves), leaves, output_grad),
    }


def _repeat(run: Callable[[], object], clock: Clock, seconds: list[float]) -> None:
    """Adds the seconds of one call, of each repetition."""
    for repetition in range(1 + REPEATS):
        clock.wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        if repetition:
            seconds.append((time.perf_counter() - start) / CALLS)
