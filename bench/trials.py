"""Launch configurations tried out, in processes that may die of it: do they compile, keep their
numbers in registers, and compute the right result?

A trial has two halves, because they may disturb a timing that goes on meanwhile differently.
`compiles` takes seconds of a CPU core and leaves the GPU alone, so the pool compiles for later
goals while this process times an earlier one: the host's part of a launch is hidden from the clock,
which lets it get ahead (`EventClock.lead`). `check` runs kernels, and a GPU that two processes
share gives each a turn of milliseconds, longer than most timings; it takes an instant once all is
compiled, so a goal's candidates are checked when its turn comes and nothing is being timed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from functools import lru_cache, partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor

import tokenmix_ops as tm
from bench.candidates import RIVALS, Goal
from bench.passes import failure, poison
from bench.pool import Answer, Pool
from bench.rows import Row
from tokenmix_ops.backends.triton import configs
from tokenmix_ops.backends.triton.configs import Architecture, Config
from tokenmix_ops.plan import Plan
from tokenmix_ops.testing import Case, Expected, expected, output_and_gradients

# The kernels themselves are imported late: without Triton the tuner has to say so.

STACK_LIMIT = 192
"""Bytes of stack that a thread of a candidate may take in the goal's first case: more than of what
ships unmeasured (`bench.aot`), because here the timing decides."""
WORD = 4
"""Bytes that one of ``n_spills`` counts for: Triton divides the driver's bytes of local memory."""
COMPILE_SECONDS, CHECK_SECONDS = 90.0, 30.0
"""What takes longer hangs. Both include the start of a process."""


def forced(architecture: Architecture, config: Config) -> Architecture:
    """Configurations under which calls that ``config`` fits run its kernel, launched so."""
    if config.kernel == "bwd_resident":
        config = replace(config, programs_per_sm=0)
    rest = (c for c in architecture.configs if c.kernel != RIVALS.get(config.kernel))
    return replace(architecture, configs=(config, *rest))


@contextmanager
def using(architecture: Architecture) -> Iterator[None]:
    """Inside the block the Triton backend launches its kernels as ``architecture`` says."""
    with configs.replaced(architecture):
        _forget_launches()
        try:
            yield
        finally:
            _forget_launches()


def _forget_launches() -> None:
    """What the backend keeps for calls of a kind that it has seen holds their configuration."""
    from tokenmix_ops.backends.triton import launch

    for function in vars(launch).values():
        if callable(getattr(function, "cache_clear", None)):
            function.cache_clear()


def compiles(goal: Goal, config: Config, device: torch.device) -> str | None:
    """Why a configuration does not compile for a goal; None if it does.

    The compiled kernels are in Triton's file cache then. The GPU is given nothing to compute.
    """
    from tokenmix_ops.backends.triton import interpreted, launch

    if interpreted():
        return None
    wanted = forced(launch.architecture(device), config)
    # Triton prints the whole program that its assembler refuses.
    with using(wanted), compiling_only(launch.KERNELS.values()), redirect_stdout(StringIO()):
        for case in _small(goal):
            *inputs, output_grad = (
                torch.empty(_shape(case), device=device, dtype=goal.dtype) for _ in range(4)
            )
            plan = case.plan_on(device)
            if why := failure(partial(_compute, goal, plan, tuple(inputs), output_grad, {})):
                return why
    return None


@contextmanager
def compiling_only(kernels: Iterable[Any]) -> Iterator[None]:
    """Inside the block a launch of these kernels compiles them, and launches nothing."""

    def warm_up(kernel: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        return type(kernel).run(kernel, *arguments, warmup=True, **options)

    kernels = list(kernels)
    for kernel in kernels:
        kernel.run = partial(warm_up, kernel)
    try:
        yield
    finally:
        for kernel in kernels:
            del kernel.run


def check(goal: Goal, config: Config, device: torch.device) -> str | None:
    """Why a configuration that compiles is no good for a goal; None if it may be timed.

    Its result is held to the computed tolerance, for two videos of each case.
    """
    from tokenmix_ops.backends.triton import launch

    kernel: Any = launch.KERNELS[config.kernel]
    # Load again, from Triton's file cache, so that what is kept belongs to this trial. The
    # interpreter keeps nothing.
    kept: dict[Any, Any] = getattr(kernel, "device_caches", {})
    kept.clear()
    with using(forced(launch.architecture(device), config)):
        for place, case in enumerate(_small(goal)):
            plan, inputs, output_grad, wanted = _problem(goal, case, device)
            found: dict[str, Tensor] = {}
            poison(*inputs, *inputs)
            compute = partial(_compute, goal, plan, inputs, output_grad, found)
            if why := failure(compute) or wanted.fault(found, goal.dtype):
                return why
            loaded = [one for cache in kept.values() for one in cache[0].values()]
            # What a candidate loses in other cases it may gain in the first.
            stack = WORD * max((one.n_spills for one in loaded), default=0)
            if place == 0 and stack > STACK_LIMIT:
                return f"takes {stack} bytes of stack, more than {STACK_LIMIT}"
    return None


def _small(goal: Goal) -> Iterable[Case]:
    """The goal's cases with two videos each; kernels are compiled for any number."""
    return dict.fromkeys(replace(case, batch=2) for case in goal.cases)


def _shape(case: Case) -> tuple[int, ...]:
    return case.batch, case.num_frames, case.num_tokens, case.num_heads, case.head_dim


def _compute(
    goal: Goal,
    plan: Plan,
    inputs: tuple[Tensor, ...],
    output_grad: Tensor,
    found: dict[str, Tensor],
) -> None:
    """Runs what the goal is about, and keeps its results."""
    call = partial(tm.token_mix_attention, mixing=plan, backend="triton")
    if goal.of_pass == "forward":
        with torch.no_grad():
            found["output"] = call(*inputs)
    else:
        found |= output_and_gradients(call, inputs, output_grad)


@lru_cache(maxsize=4)
def _problem(
    goal: Goal, case: Case, device: torch.device
) -> tuple[Plan, tuple[Tensor, ...], Tensor, Expected]:
    """Plan, inputs, gradient of the output, and what is expected."""
    generator = torch.Generator(device).manual_seed(0)
    *inputs, output_grad = (
        torch.randn(_shape(case), generator=generator, device=device, dtype=goal.dtype)
        for _ in range(4)
    )
    plan = case.plan_on(device)
    wanted = expected(tuple(inputs), output_grad, plan)
    if device.type == "cuda":
        # Other processes need the memory too.
        torch.cuda.empty_cache()
    return plan, tuple(inputs), output_grad, wanted


Half = Callable[[Goal, Config, torch.device], "str | None"]


class Trials:
    """Tries the candidates of goals in a pool; all are compiled in the order of the goals, from
    now on."""

    def __init__(
        self,
        pool: Pool,
        candidates: Mapping[Goal, Sequence[Config]],
        device: torch.device,
        log: Callable[[Row], object],
        halves: tuple[Half, Half] = (compiles, check),
    ) -> None:
        self.pool, self.device, self.log = pool, device, log
        compiling, self.checking = halves
        self.compiling = {
            goal: {
                pool.submit(compiling, goal, config, device, seconds=COMPILE_SECONDS): config
                for config in of_goal
            }
            for goal, of_goal in candidates.items()
        }

    def able(self, goal: Goal, until: float) -> list[Config]:
        """The candidates of a goal that may be timed, of those whose trial ends before the moment
        ``until`` of `time.monotonic`. The others are logged, each with its reason."""
        asked = dict(self.compiling[goal])
        checks: dict[Answer, Config] = {}
        faults: dict[Config, str | None] = dict.fromkeys(asked.values(), "no time was left for it")
        pending = set(asked)
        while pending:
            done, pending = wait(pending, max(0.0, until - time.monotonic()), FIRST_COMPLETED)
            if not done:
                break
            for answer in done:
                config, why = asked[answer], answer.result()
                if why or answer in checks:
                    faults[config] = why
                    continue
                checked = self.pool.submit(
                    self.checking, goal, config, self.device, seconds=CHECK_SECONDS, urgent=True
                )
                checks[checked] = asked[checked] = config
                pending.add(checked)
        # What runs on the GPU has to end before the timing begins.
        wait([answer for answer in pending if not answer.cancel() and answer in checks])
        for config, why in faults.items():
            if why:
                self.log({"goal": str(goal), "config": asdict(config), "reason": why})
        dropped = Counter(why for why in faults.values() if why)
        shown = ", ".join(f"{number} × {why}" for why, number in dropped.items())
        print(f"{goal}: {len(faults)} candidates; dropped: {shown or 'none'}", flush=True)
        return [config for config, why in faults.items() if why is None]
