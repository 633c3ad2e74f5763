"""The first thing to know of the kernels on a GPU: whether they compute the right thing there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import tokenmix_ops as tm
from bench.passes import failure, poison
from bench.rows import Row
from bench.trials import using
from tokenmix_ops.backends.triton.configs import Architecture
from tokenmix_ops.testing import Case, expected, output_and_gradients

ALGORITHMS = {
    "resident": ("fwd_resident", "bwd_resident"),
    "streamed": ("fwd_streamed", "bwd_query", "bwd_key"),
}
"""The kernels that compute a call forward and backward."""
GRADIENTS = ("query gradient", "key gradient", "value gradient")
RESULTS = {
    "fwd_resident": ("output",),
    "fwd_streamed": ("output",),
    "bwd_resident": GRADIENTS,
    "bwd_query": GRADIENTS[:1],
    "bwd_key": GRADIENTS[1:],
}
"""What a kernel writes."""


def smoke_rows(
    shape: str, case: Case, dtype: torch.dtype, algorithm: str, device: str
) -> list[Row]:
    """A row for each kernel of an algorithm: "right", "wrong" with ``why``, or "not shipped".

    Kernels run as their launch file says, into poisoned memory, twice. Results are held to the
    computed tolerance of float64, and to the same bits.
    """
    from tokenmix_ops.backends.triton import launch

    own = launch.architecture(torch.device(device))
    plan = case.plan_on(device)
    bits = 8 * dtype.itemsize
    shipped = [
        kernel
        for kernel in ALGORITHMS[algorithm]
        if own.find(kernel, bits, case.head_dim, plan.num_keys)
    ]
    inputs = tuple(t.detach() for t in case.inputs(dtype, device))
    generator = torch.Generator().manual_seed(1)
    output_grad = torch.randn(inputs[0].shape, generator=generator).to(device, dtype)
    call = partial(tm.token_mix_attention, mixing=plan, backend="triton")
    found: list[dict[str, Tensor]] = []

    def run() -> None:
        with using(only(own, algorithm)):
            for _ in range(2):
                poison(*inputs, *inputs)
                found.append(output_and_gradients(call, inputs, output_grad))

    failed = failure(run) if shipped else None
    wanted = None if failed or not shipped else expected(inputs, output_grad, plan)
    rows = []
    for kernel in ALGORITHMS[algorithm]:
        name = str(dtype).removeprefix("torch.")
        row: Row = {"part": "smoke", "kernel": kernel, "shape": shape, "dtype": name}
        if kernel not in shipped:
            row["outcome"] = "not shipped"
        else:
            results = [{key: once[key] for key in RESULTS[kernel]} for once in found]
            why = failed or (wanted and wanted.fault(results[0], dtype)) or _other_bits(results)
            row |= {"outcome": "wrong", "why": why} if why else {"outcome": "right"}
        rows.append(row)
    return rows


def wrong_rows(shape: str, dtype: torch.dtype, algorithm: str, why: str) -> list[Row]:
    """What `smoke_rows` would say if its process could."""
    about = {"part": "smoke", "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
    return [
        {**about, "kernel": kernel, "outcome": "wrong", "why": why}
        for kernel in ALGORITHMS[algorithm]
    ]


def only(architecture: Architecture, algorithm: str) -> Architecture:
    """Launch configurations under which calls take the kernels of one algorithm."""
    if algorithm == "streamed":
        kept = [c for c in architecture.configs if not c.kernel.endswith("resident")]
    else:
        # However few the programs are.
        kept = [
            replace(c, programs_per_sm=0) if c.kernel == "bwd_resident" else c
            for c in architecture.configs
        ]
    return replace(architecture, configs=tuple(kept))


def _other_bits(results: Sequence[dict[str, Tensor]]) -> str | None:
    once, again = results
    different = [name for name in once if not torch.equal(once[name], again[name])]
    return f"{', '.join(different)}: other bits the second time" if different else None
