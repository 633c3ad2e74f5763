"""What the host spends on one call, when the device has next to nothing to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tokenmix_ops as tm
from bench.passes import failure
from bench.rows import Row
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.timing import Clock, rounded

# Fewer than fit the queue of launches, or the host would wait for the device.
CALLS, REPEATS = 200, 15


def host_rows(clock: Clock, device: str, backend: str = "triton") -> list[Row]:
    """Microseconds of the host for each call, without and with autograd, and of SDPA's own.

    Nothing is subtracted: checks, the choice of backend, the plan, allocations, launches.
    """
    shape, dtype = (1, 2, 5, 1, 64), torch.bfloat16
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
