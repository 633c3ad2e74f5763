"""The benchmark suites: each turns cases into rows of data."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from tokenmix_ops.bench.layers import Layer, contenders
from tokenmix_ops.bench.measure import Timings, environment, time_side_by_side

Row = dict[str, Any]
Progress = Callable[[int, int], object]
"""Called with the rounds done and their total."""


def layer_timings(
    layers: dict[str, Layer],
    *,
    batch: int,
    num_frames: int,
    num_tokens: int,
    dim: int,
    rounds: int,
    progress: Progress | None = None,
) -> dict[str, Timings]:
    """Seconds of whole attention layers, "forward" and "forward + backward", by contender."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch * num_frames, num_tokens, dim, generator=generator)
    output_grad = torch.randn(tokens.shape, generator=generator)

    def forward(layer: Layer) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                layer(tokens)

        return run

    def forward_backward(layer: Layer) -> Callable[[], object]:
        def run() -> None:
            leaf = tokens.detach().requires_grad_()
            layer(leaf).backward(output_grad)

        return run

    timings = {}
    for number, (name, make) in enumerate(
        (("forward", forward), ("forward + backward", forward_backward))
    ):
        done_before = number * rounds

        def report(done: int, before: int = done_before) -> None:
            if progress is not None:
                progress(before + done, 2 * rounds)

        timings[name] = time_side_by_side(
            {key: make(layer) for key, layer in layers.items()}, rounds, report
        )
    return timings


def layer_suite(rounds: int = 21, progress: Progress | None = None) -> list[Row]:
    """One attention layer of BLIP ViT-B/16, float32: 2 videos of 8 frames of 197 tokens."""
    shape = {"batch": 2, "num_frames": 8, "num_tokens": 197, "dim": 768}
    heads = 12
    torch.manual_seed(0)
    timings = layer_timings(
        contenders(shape["dim"], heads, shape["num_frames"]),
        **shape,
        rounds=rounds,
        progress=progress,
    )
    return [
        {
            "suite": "layer",
            "device": "cpu",
            "dtype": "float32",
            **shape,
            "num_heads": heads,
            "pass": name,
            "contender": contender,
            "median_ms": round(1e3 * median(seconds), 2),
            "rounds_ms": [round(1e3 * s, 2) for s in seconds],
            **environment(),
        }
        for name, of_pass in timings.items()
        for contender, seconds in of_pass.items()
    ]


SUITES: dict[str, Callable[[int, Progress | None], list[Row]]] = {"layer": layer_suite}
