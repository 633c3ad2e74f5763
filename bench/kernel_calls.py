"""The kernels that a time-boxed run on a GPU needs, compiled without one into a Triton cache."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tokenmix_ops as tm
from bench.candidates import GOALS, Chip, Goal, candidates
from bench.kernel_archive import maker, variables
from bench.operators import ADJACENT, MAIN, OFF, SHAPES, Shape
from bench.passes import failure
from bench.pretence import pretend
from bench.side_by_side import each
from bench.smoke import ALGORITHMS, only
from bench.trials import forced, using
from tokenmix_ops.backends import triton
from tokenmix_ops.backends.triton import configs
from tokenmix_ops.backends.triton.configs import Config
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.modules import TokenMixAttention
from tokenmix_ops.peer_layers import GAINS, mixing_layer
from tokenmix_ops.testing import CASES, Case

Call = Callable[[], object]
Progress = Callable[[int, int], object]

ARCHITECTURE = "sm_90"
DEVICE = torch.device("cuda", 0)
PINS = Path(__file__).parent.parent / "tools" / "gpu.txt"
PYTHON = "3.12"
"""On the GPU machine."""
HOST = Case(MAIN.mixing, batch=1, num_frames=2, num_tokens=5, num_heads=1, head_dim=64)
"""On which the host's time is measured."""


def refusal() -> str | None:
    """Why kernels that are compiled here are of no use on the GPU machine; None if they are."""
    (pinned,) = re.findall(r"^triton==(\S+)$", PINS.read_text(), re.MULTILINE)
    wanted, here = {"Python": PYTHON, "Triton": pinned}, maker()
    if all(here[name] == version for name, version in wanted.items()):
        return None
    expected, got = (
        ", ".join(f"{name} {versions[name]}" for name in wanted) for versions in (wanted, here)
    )
    return f"expected {expected}, which the GPU machine has, got {got}: run make gpu-cache"


def all_calls() -> dict[str, Call]:
    """What a run calls, by name, the most important first.

    Of its tests, the product of all cases; what else they call is compiled when they run.
    """
    calls: dict[str, Call] = {shape.name: partial(_shape, shape) for shape in SHAPES}
    calls |= {f"layer, {name}": partial(_layer, gain) for name, gain in GAINS.items()}
    calls["host"] = partial(_operator, HOST, torch.bfloat16)
    for mixing in (MAIN.mixing, OFF, ADJACENT):
        for dtype in (torch.bfloat16, torch.float32):
            for algorithm in ALGORITHMS:
                call = partial(_by, algorithm, replace(MAIN, mixing=mixing), dtype)
                calls[f"smoke, {mixing!r}, {dtype}, {algorithm}"] = call
    for goal in GOALS:
        for config in candidates(goal, (configs.load(ARCHITECTURE),), Chip()):
            calls[f"{goal}: {config}"] = partial(_candidate, goal, config)
    for case in CASES:
        if case.mixing.kind != "temporal":
            for dtype in triton.DTYPES:
                calls[f"test, {case}, {dtype}"] = partial(_operator, case, dtype)
            for algorithm in ALGORITHMS:
                small = replace(case, batch=1, num_heads=1)
                calls[f"test, {small}, {algorithm}"] = partial(_by, algorithm, small, torch.float16)
    return calls


def _operator(case: Case, dtype: torch.dtype) -> None:
    plan = case.plan_on(DEVICE)
    tm.token_mix_attention(*case.inputs(dtype, DEVICE), mixing=plan, backend="triton")


def _shape(shape: Shape) -> None:
    _operator(shape.case, shape.dtype)
    if shape.selected:
        _operator(replace(shape.case, layout="selected"), shape.dtype)


def _layer(cross_frame_gain: float) -> None:
    dim, dtype = MAIN.num_heads * MAIN.head_dim, torch.bfloat16
    weights = TokenMixAttention(dim, MAIN.num_heads, MAIN.num_frames, device=DEVICE, dtype=dtype)
    layer = mixing_layer(weights, Mixing.released(cross_frame_gain=cross_frame_gain), "triton")
    layer(torch.empty((MAIN.num_frames, MAIN.num_tokens, dim), dtype=dtype, device=DEVICE))


def _by(algorithm: str, case: Case, dtype: torch.dtype) -> None:
    """With the kernels of one algorithm."""
    with using(only(configs.load(ARCHITECTURE), algorithm)):
        _operator(case, dtype)


def _candidate(goal: Goal, config: Config) -> None:
    with using(forced(configs.load(ARCHITECTURE), config)):
        for case in goal.cases:
            _operator(case, goal.dtype)


def compile_all(
    calls: Mapping[str, Call], folder: Path, progress: Progress
) -> tuple[set[str], dict[str, str]]:
    """Compiles the kernels of calls into a Triton cache, by as many processes as there are cores.

    What is in the cache is not compiled again. Returns the hashes of the kernels, and by name why
    calls failed; ``progress`` is told how many calls of how many are done.
    """
    kernels: set[str] = set()
    failed: dict[str, str] = {}
    names, tasks = list(calls), [(call,) for call in calls.values()]
    with _environment(**variables(folder), TRITON_STORE_BINARY_ONLY="1"):
        for done, (number, (why, found)) in enumerate(each(_run, tasks, _start), start=1):
            kernels |= found
            if why:
                failed[names[number]] = why
            progress(done, len(names))
    return kernels, failed


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """For processes that start inside: of Triton's variables, these alone."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("TRITON_"):
            del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


_kernels: set[str] = set()
"""Those that a process has compiled or found in the cache since it was last asked."""


def _start() -> None:
    from triton import knobs

    torch.set_num_threads(1)
    pretend()
    knobs.compilation.listener = _note


def _note(*, metadata: Mapping[str, Any], **_: object) -> None:
    _kernels.add(metadata["hash"])


def _run(call: Call) -> tuple[str | None, set[str]]:
    # Autograd would look for the GPU.
    with torch.no_grad():
        why = failure(call)
    found = set(_kernels)
    _kernels.clear()
    return why, found
