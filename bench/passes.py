"""Forward and backward passes of contenders, timed in turn on rotating inputs, within a budget."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bench.rows import Row
from tokenmix_ops.timing import Clock, Timings, Turn, figures, rounded, time_in_turn

PASSES = ("forward", "forward + backward", "backward")
FEWEST_ROUNDS, MOST_ROUNDS = 7, 41


@dataclass(frozen=True)
class Contender:
    """A function of tensors, the sets of inputs that it is called with in turn, for each set the
    gradient of its output, and parameters whose gradients a backward pass has to make as well."""

    call: Callable[..., Tensor]
    sets: Sequence[tuple[Tensor, ...]]
    output_grads: Sequence[Tensor]
    parameters: tuple[Tensor, ...] = ()


@dataclass
class Race:
    """What was measured of one pass: seconds by contender, bytes that it needed beyond its inputs
    and results at its peak (none known without a GPU), and the reasons of those that could not."""

    timings: Timings = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def turn(contender: Contender, of_pass: str) -> Turn:
    """One pass as something to be timed. The graph of a backward pass is made beforehand, anew for
    each, because compiled code gives up its buffers in the first backward."""

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
) -> Race:
    """Times one pass of all contenders in turn, for about so many seconds or for ``rounds``.

    One that fails, for want of memory for example, is left out with its reason.
    """
    found = Race()
    turns: dict[str, Turn] = {}
    for name, contender in contenders.items():
        turns[name] = turn(contender, of_pass)
        why = failure(partial(_warm_up, turns[name], clock, found.extra_bytes, name))
        if why:
            found.reasons[name] = why
            del turns[name]
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
    """Why a run fails, in one line with what it warned of; None if it does not."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        try:
            run()
            return None
        # Whatever a peer raises: the others are to be measured all the same.
        except Exception as error:
            why = _sentence(error, [str(note.message) for note in noted])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
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
        left = max(0, seconds - (now - start))
        print(f"{name}: {outcome}, {now - begin:.0f} s; {left:.0f} s left", flush=True)
    return left_out
