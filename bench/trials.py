"""Launch configurations tried out, each in a process that may die of it: does it compile, keep its
numbers in registers, and compute the right result?"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

import tokenmix_ops as tm
from bench.passes import failure, poison
from tokenmix_ops.backends.triton import configs
from tokenmix_ops.backends.triton.configs import Architecture, Config
from tokenmix_ops.plan import Plan
from tokenmix_ops.testing import Case, Expected, expected, output_and_gradients

# The kernels themselves are imported late: without Triton the tuner has to say so.

RIVALS = {
    "fwd_streamed": "fwd_resident",
    "bwd_query": "bwd_resident",
    "bwd_key": "bwd_resident",
}
"""The kernel that is used in place of another where it has a configuration."""


@dataclass(frozen=True)
class Goal:
    """One entry of a configuration file that is to be found, and the calls that it has to serve."""

    kernel: str
    dtype_bits: int
    head_dim: int
    num_keys: int | None
    cases: tuple[Case, ...]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype_bits == 16 else torch.float32

    @property
    def of_pass(self) -> str:
        return "forward" if self.kernel.startswith("fwd") else "backward"

    def __str__(self) -> str:
        keys = "any number of keys" if self.num_keys is None else f"at most {self.num_keys} keys"
        return f"{self.kernel}, {self.dtype_bits} bits, head_dim {self.head_dim}, {keys}"


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


def trial(goal: Goal, config: Config, device: torch.device) -> str | None:
    """Why a configuration is no good for a goal; None if it may be timed.

    Its result is held to the computed tolerance, for two videos of each case.
    """
    from tokenmix_ops.backends.triton import launch

    kernel: Any = launch.KERNELS[config.kernel]
    # Compile again, from Triton's file cache if possible, so that what is kept belongs to this
    # trial. The interpreter keeps nothing.
    kept: dict[Any, Any] = getattr(kernel, "device_caches", {})
    kept.clear()
    with using(forced(launch.architecture(device), config)):
        for case in dict.fromkeys(replace(case, batch=2) for case in goal.cases):
            plan, inputs, output_grad, wanted = _problem(goal, case, device)
            found: dict[str, Tensor] = {}
            compute = partial(_compute, goal, plan, inputs, output_grad, found)
            if why := failure(compute) or wanted.fault(found, goal.dtype):
                return why
    spilled = [k.n_spills for cache in kept.values() for k in cache[0].values()]
    return f"spills {max(spilled)} registers" if any(spilled) else None


def _compute(
    goal: Goal,
    plan: Plan,
    inputs: tuple[Tensor, ...],
    output_grad: Tensor,
    found: dict[str, Tensor],
) -> None:
    """Runs what the goal is about, and keeps its results."""
    call = partial(tm.token_mix_attention, mixing=plan, backend="triton")
    poison(*inputs, *inputs)
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
    shape = (case.batch, case.num_frames, case.num_tokens, case.num_heads, case.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    *inputs, output_grad = (
        torch.randn(shape, generator=generator, device=device, dtype=goal.dtype) for _ in range(4)
    )
    plan = case.plan_on(device)
    wanted = expected(tuple(inputs), output_grad, plan)
    if device.type == "cuda":
        # Other processes need the memory too.
        torch.cuda.empty_cache()
    return plan, tuple(inputs), output_grad, wanted


Task = tuple[Any, ...]
Trial = Callable[..., "str | None"]


def try_all(
    tasks: Sequence[Task],
    trial: Trial,
    processes: int,
    deadline: float,
    progress: Callable[[int], object],
) -> dict[Task, str | None]:
    """What ``trial(*task)`` answers for each task, or that its process died or had no time left.

    So many processes work at once, until the ``deadline`` of `time.monotonic`. ``trial`` is a
    function of a module, ``progress`` is called with the number of tasks done.
    """
    answers: dict[Task, str | None] = {}
    waiting = iter(tasks)
    lock = threading.Lock()

    def work() -> None:
        worker: _Worker | None = None
        while time.monotonic() < deadline:
            with lock:
                task = next(waiting, None)
            if task is None:
                break
            worker = worker or _Worker(trial)
            answers[task] = worker.ask(task, deadline)
            worker = worker if worker.alive else None
            with lock:
                progress(len(answers))
        if worker is not None:
            worker.stop()

    threads = [threading.Thread(target=work) for _ in range(min(processes, len(tasks)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {task: answers.get(task, "no time was left to try it") for task in tasks}


class _Worker:
    """A process that answers one task after the other."""

    def __init__(self, trial: Trial) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_answer, args=(trial, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.alive = True

    def ask(self, task: Task, deadline: float) -> str | None:
        answer: str | None = "its process died"
        try:
            self.pipe.send(task)
            if self.pipe.poll(max(0.0, deadline - time.monotonic())):
                answer = self.pipe.recv()
                return answer
            answer = "no time was left to finish it"
        except (EOFError, OSError):
            pass
        self.stop()
        return answer

    def stop(self) -> None:
        self.alive = False
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _answer(trial: Trial, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        answer = trial(*task)
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                # After some errors a process can use its GPU no more: the next task gets another.
                os._exit(1)
        pipe.send(answer)
