"""The time below which no computation of the operator can go on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from tokenmix_ops.plan import Plan
from tokenmix_ops.testing import Case
from tokenmix_ops.timing import Clock, time_in_turn

EXPONENTIALS = 3.9e12 / 132
"""Exponentials a second of one multiprocessor: 16 a cycle, at the H200's clock."""


@dataclass(frozen=True)
class Work:
    """What has to be done: floating-point operations of products, bytes through device memory, each
    input read once and each output written once, and exponentials."""

    flops: float
    bytes: float
    exponentials: float


@dataclass(frozen=True)
class Ceilings:
    """What a device can do in a second, the first two measured on it."""

    flops: float
    bytes: float
    exponentials: float


def floor(work: Work, ceilings: Ceilings) -> float:
    """Seconds of the part of the work that takes longest, if all else hides behind it.

    The largest of flops / matrix rate, bytes / copy bandwidth, exponentials / their rate.
    """
    return max(
        work.flops / ceilings.flops,
        work.bytes / ceilings.bytes,
        work.exponentials / ceilings.exponentials,
    )


def forward_work(case: Case, plan: Plan, itemsize: int) -> Work:
    """Two products; query and the keys and values in use are read, output is written."""
    logits = _logits(case, plan)
    query, used, _ = _bytes(case, plan, itemsize)
    return Work(4 * logits * case.head_dim, 2 * query + 2 * used, logits)


def backward_work(case: Case, plan: Plan, itemsize: int) -> Work:
    """Five products; query, output, its gradient, the keys and values in use and a float32 for each
    query (lse) are read, the gradients of query, key and value are written."""
    logits = _logits(case, plan)
    query, used, key = _bytes(case, plan, itemsize)
    lse = 4 * logits // plan.num_keys
    return Work(10 * logits * case.head_dim, 4 * query + 2 * used + 2 * key + lse, logits)


def works(case: Case, plan: Plan, itemsize: int) -> dict[str, tuple[Work, ...]]:
    """The work of each pass, whose floors add up."""
    forward, backward = (of(case, plan, itemsize) for of in (forward_work, backward_work))
    return {
        "forward": (forward,),
        "forward + backward": (forward, backward),
        "backward": (backward,),
    }


def _logits(case: Case, plan: Plan) -> int:
    return case.batch * case.num_heads * case.num_frames * case.num_tokens * plan.num_keys


def _bytes(case: Case, plan: Plan, itemsize: int) -> tuple[int, int, int]:
    """Of all queries, of the keys in use, of all keys."""
    token = case.batch * case.num_heads * case.head_dim * itemsize
    tokens = case.num_frames * case.num_tokens
    return token * tokens, token * int(plan.key_index.unique().numel()), token * tokens


def measured_ceilings(
    dtypes: tuple[torch.dtype, ...], clock: Clock, device: str = "cuda", size: int = 8192
) -> dict[torch.dtype, Ceilings]:
    """What a device reaches on random numbers: in a copy of 64 * size**2 bytes, and for each dtype
    in the product of two matrices [size, size]."""
    generator = torch.Generator(device).manual_seed(0)
    source = torch.randn((16, size, size), generator=generator, device=device)
    copied = 2 * source.nbytes / _median(partial(torch.empty_like(source).copy_, source), clock)
    del source
    on_gpu = torch.device(device).type == "cuda"
    gpu = torch.cuda.get_device_properties(device) if on_gpu else None
    exponentials = EXPONENTIALS * (gpu.multi_processor_count if gpu else 1)
    found = {}
    for dtype in dtypes:
        left, right = (
            torch.randn((size, size), generator=generator, device=device, dtype=dtype)
            for _ in range(2)
        )
        seconds = _median(partial(torch.mm, left, right, out=torch.empty_like(left)), clock)
        found[dtype] = Ceilings(2 * size**3 / seconds, copied, exponentials)
    return found


def _median(run: Callable[[], object], clock: Clock) -> float:
    """Seconds of a run, after three to get warm."""
    return median(time_in_turn({"": lambda number: run}, 18, clock)[""][3:])
