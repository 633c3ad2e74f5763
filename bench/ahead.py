"""What compiles in the background of a run on a GPU, so that later stages only have to load it."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from importlib.util import find_spec

import torch

from bench.forks import in_processes
from bench.job import Job
from bench.operators import SHAPES, Shape
from bench.rehearsal import tiny
from bench.rows import Row, append_rows
from tokenmix_ops.peers import operators
from tokenmix_ops.testing import output_and_gradients

LONGEST = 120.0
"""Seconds after which a compilation counts as hung."""


def compile_ahead(job: Job) -> None:
    """Compiles what later stages time into the caches that they share, the most important first.

    For each shape: FlexAttention, whose graphs Inductor keeps on disk under a key of their code,
    constants and shapes, and our own kernels.
    """
    os.nice(10)
    # Each process here has one core.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    job.compiling.touch()
    if find_spec("triton") is not None:
        # Imported once for all of them.
        from tokenmix_ops.backends.triton import launch as launch
    shapes = [replace(shape, case=tiny(shape.case)) for shape in SHAPES[:1]] if job.dry else SHAPES
    kinds = ("eager",) if job.dry else ("triton", "flex, forward", "flex, backward")
    tasks = [
        (job, shape, kind)
        for shape in shapes
        for kind in kinds
        if kind != "flex, backward" or "backward" in shape.passes
    ]
    in_processes(_compile_one, tasks, max(1, (os.cpu_count() or 1) // 2), LONGEST)
    job.compiling.unlink(missing_ok=True)


def _compile_one(job: Job, shape: Shape, kind: str) -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    row: Row = {"part": "compiled", "what": f"{kind}: {shape.name}"}
    try:
        run_once(shape, kind, "cpu" if job.dry else "cuda")
    except Exception as error:
        row["why"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    row["seconds"] = round(time.perf_counter() - start, 1)
    append_rows(job.work / "compiled.jsonl", [row])


def run_once(shape: Shape, kind: str, device: str) -> None:
    """Runs one contender at a shape: forward if ``kind`` says so, else both ways."""
    case, plan = shape.case, shape.case.plan_on(device)
    sizes = (case.batch, case.num_frames, case.num_tokens, case.num_heads, case.head_dim)
    *inputs, output_grad = (torch.zeros(sizes, device=device, dtype=shape.dtype) for _ in range(4))
    call = operators(plan, compiled=device != "cpu")[kind.split(",")[0]]
    if isinstance(call, str):
        raise RuntimeError(call)
    if kind.endswith("forward"):
        with torch.no_grad():
            call(*inputs)
    else:
        output_and_gradients(call, tuple(inputs), output_grad)
