"""Forward and backward passes of contenders: right first, then timed in turn on rotating inputs.

This project's own kernels are held to the computed tolerance. Its bounds do not cover what peers
round, so these may be off by a few times what right ones are.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from types import MappingProxyType

import torch
from torch import Tensor

import tokenmix_ops as tm
from bench.rows import Row
from tokenmix_ops.plan import Plan
from tokenmix_ops.testing import Attention, expected, output_and_gradients
from tokenmix_ops.timing import Clock, Timings, Turn, figures, rounded, time_in_turn
from tokenmix_ops.tolerance import FUSED, Arithmetic

PASSES = ("forward", "forward + backward", "backward")
LARGEST_ERROR = {
    torch.bfloat16: 1.5e-2,
    torch.float16: 2e-3,
    torch.float32: 1e-4,
    torch.float64: 1e-5,
}
"""Relative errors of outputs above which a peer computes something else: a few times those of right
ones, and far below that of a forgotten gain, or in float32 of TF32. Gradients may have twice as
much."""
BACKENDS = {"eager": Arithmetic(composed=True), "triton": FUSED, "cpu": FUSED}
"""What this project's backends may round."""
FEWEST_ROUNDS, MOST_ROUNDS = 7, 41


Begin = Callable[[str, str], object]
"""Is told which contender is about to run, and in which pass, in case the process does not survive
it; "" is all of them in turn."""


class BrokenDevice(BaseException):
    """The GPU has failed in a way after which this process can use it no more.

    No `Exception`, so that nobody goes on with the next contender, which would fail as well.
    """


@dataclass(frozen=True)
class Contender:
    """A function of tensors, the sets of inputs that it is called with in turn, for each set the
    gradient of its output, and parameters whose gradients a backward pass has to make as well."""

    call: Callable[..., Tensor]
    sets: Sequence[tuple[Tensor, ...]]
    output_grads: Sequence[Tensor]
    parameters: tuple[Tensor, ...] = ()


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
    begin: Callable[[str], object] = lambda of_pass: None,
) -> tuple[dict[str, float], str | None, str | None]:
    """Relative errors of a contender's first and last head of the first and last video, and why it
    must not be timed: at all, or in backward passes.

    ``arithmetic`` is what one of our own kernels may round; None of a peer. Both are compared with
    float64, of those heads alone. ``begin`` is told each pass before it runs.
    """
    inputs, output_grad = contender.sets[0], contender.output_grads[0]
    of_ends, grad_of_ends = tuple(map(_ends, inputs)), _ends(output_grad)
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
        begin("backward" if grads else "forward")
        poison(*inputs, *inputs)
        if grads:
            actual = output_and_gradients(run, inputs, output_grad)
        else:
            with torch.no_grad():
                actual = {"output": run(*inputs)}
        actual = {key: _ends(t) for key, t in actual.items()}
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


def _ends(tensor: Tensor) -> Tensor:
    """The first and last head of the first and last video."""
    return tensor[[0, -1]][..., [0, -1], :]


def _verdict(check: Callable[[], str | None]) -> str | None:
    """What a check finds, or why it fails."""
    verdicts: list[str | None] = []
    return failure(lambda: verdicts.append(check())) or verdicts[0]


@dataclass
class Race:
    """What was measured of one pass: seconds by contender, bytes that it needed beyond its inputs
    and results at its peak (none known without a GPU), and the reasons of those that could not."""

    timings: Timings = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def turn(contender: Contender, of_pass: str) -> Turn:
    """One pass, ready to be timed. Each backward pass gets a new graph beforehand, because compiled
    code frees its buffers in the first backward."""

    def inputs(number: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        place = number % len(contender.sets)
        leaves = tuple(t.detach().requires_grad_() for t in contender.sets[place])
        return leaves, (*leaves, *contender.parameters), contender.output_grads[place]

    def forward(number: int) -> Callable[[], object]:
        tensors = contender.sets[number % len(contender.sets)]

        def run() -> Tensor:
            with torch.no_grad():
                return contender.call(*tensors)

        return run

    def forward_backward(number: int) -> Callable[[], object]:
        leaves, wanted, grad = inputs(number)
        return lambda: torch.autograd.grad(contender.call(*leaves), wanted, grad)

    def backward(number: int) -> Callable[[], object]:
        leaves, wanted, grad = inputs(number)
        output = contender.call(*leaves)
        return lambda: torch.autograd.grad(output, wanted, grad)

    return dict(zip(PASSES, (forward, forward_backward, backward), strict=True))[of_pass]


def race(
    contenders: Mapping[str, Contender],
    of_pass: str,
    clock: Clock,
    seconds: float,
    rounds: int | None = None,
    begin: Begin = lambda contender, of_pass: None,
    yardsticks: Mapping[str, Turn] = MappingProxyType({}),
) -> Race:
    """Times one pass of all contenders in turn, for about so many seconds or for ``rounds``.

    One that fails, out of memory for example, is left out with its reason. ``begin`` is told
    who warms up. ``yardsticks`` take turns too.
    """
    found = Race()
    turns: dict[str, Turn] = {}
    for name, ready in (
        *((name, turn(contender, of_pass)) for name, contender in contenders.items()),
        *yardsticks.items(),
    ):
        begin(name, of_pass)
        turns[name] = ready
        why = failure(partial(_warm_up, turns[name], clock, found.extra_bytes, name))
        if why:
            found.reasons[name] = why
            del turns[name]
    begin("", of_pass)
    start = time.perf_counter()
    while turns and (why := failure(partial(time_in_turn, turns, 1, clock))):
        hungriest = max(turns, key=lambda name: found.extra_bytes.get(name, 0))
        found.reasons[hungriest] = f"beside the others: {why}"
        del turns[hungriest]
        start = time.perf_counter()
    if rounds is None:
        fitting = int(seconds / max(time.perf_counter() - start, 1e-6))
        rounds = min(max(fitting, FEWEST_ROUNDS), MOST_ROUNDS)
    found.timings = time_in_turn(turns, rounds, clock)
    return found


def rows_of(
    result: Race,
    about: Row,
    names: Sequence[str],
    refused: Mapping[str, str],
    errors: Mapping[str, Mapping[str, float]],
) -> list[Row]:
    """A row for each of ``names``: its figures, or why there are none.

    ``refused`` has the reasons of those that did not take part, ``errors`` the relative errors that
    were found before.
    """
    rows: list[Row] = []
    for name in names:
        row: Row = {**about, "contender": name}
        if name in result.timings:
            row |= figures(result.timings[name])
            row["relative_error"] = {key: rounded(e) for key, e in errors.get(name, {}).items()}
        else:
            row["reason"] = {**refused, **result.reasons}[name]
        if name in result.extra_bytes:
            row["extra_mb"] = rounded(result.extra_bytes[name] / 1e6)
        rows.append(row)
    return rows


def failure(run: Callable[[], object]) -> str | None:
    """Why a run fails, in one line with what it warned of; None if it does not.

    Raises `BrokenDevice` if nothing else could run on the GPU after it.
    """
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        try:
            run()
            return None
        # A peer may raise anything; the others are still measured.
        except Exception as error:
            why = _sentence(error, [str(note.message) for note in noted])
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise BrokenDevice(why) from error
    return why


def _sentence(error: BaseException, warned: Sequence[str]) -> str:
    """What an error is at bottom, compilers wrap theirs, and what was warned of before."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [" ".join(text.strip().split("\n")[0].split()) for text in (str(error), *warned)]
    unique = list(dict.fromkeys(line for line in lines if line))
    return f"{type(error).__name__}: {'; '.join(unique)}"[:400]


def _warm_up(ready: Turn, clock: Clock, extra_bytes: dict[str, int], name: str) -> None:
    """Runs it twice, and on a GPU once more for the peak of its memory."""
    for number in range(2):
        ready(number)()
    clock.wait()
    if not torch.cuda.is_available():
        return
    run = ready(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    kept = results if isinstance(results, tuple) else (results,)
    results_bytes = sum(t.nbytes for t in kept if isinstance(t, Tensor))
    peak = torch.cuda.max_memory_allocated() - before
    extra_bytes[name] = max(0, peak - results_bytes)


Part = Callable[[], list[Row]]
"""Measures something and returns its rows."""


def run_parts(
    named_parts: Iterable[tuple[str, Part]], seconds: float, keep: Callable[[list[Row]], object]
) -> list[str]:
    """Runs parts until the time is up, and hands each one's rows to ``keep``; names what could not
    be measured, with the reason."""
    left_out = []
    start = time.monotonic()
    for name, part in named_parts:
        begin = time.monotonic()
        if begin - start > seconds:
            left_out.append(f"{name}: the time was up")
            continue
        outcome = "done"
        try:
            keep(part())
        # One part that breaks must not cost the others' figures.
        except Exception as error:
            traceback.print_exc()
            outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            left_out.append(f"{name}: {outcome}")
        now = time.monotonic()
        left = f"; {max(0, seconds - (now - start)):.0f} s left" if isfinite(seconds) else ""
        print(f"{name}: {outcome}, {now - begin:.0f} s{left}", flush=True)
    return left_out
