"""Whole attention layers on a device, projections included, against the layer that is replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenmix_ops.bench.layers import Layer, layers_on
from tokenmix_ops.bench.measure import Clock
from tokenmix_ops.bench.passes import (
    PASSES,
    Contender,
    failure,
    fault,
    race,
    relative_errors,
    rows_of,
)
from tokenmix_ops.bench.suites import Row
from tokenmix_ops.modules import TokenMixAttention


def layer_rows(
    clock: Clock,
    device: str,
    seconds: float,
    *,
    batch: int,
    num_frames: int = 8,
    num_tokens: int = 197,
    num_heads: int = 12,
    dim: int = 768,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "triton",
) -> list[Row]:
    """Rows of every layer, forward and forward + backward, parameters' gradients included.

    ``backend`` is that of this project's layers. A layer is timed if it agrees with itself in
    float64, on the eager backend.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    torch.manual_seed(0)
    weights = TokenMixAttention(dim, num_heads, num_frames, device=device, dtype=dtype)
    exact_weights = TokenMixAttention(
        dim, num_heads, num_frames, device=device, dtype=torch.float64
    )
    exact_weights.load_state_dict(weights.state_dict())
    layers, exact_layers = layers_on(weights, backend), layers_on(exact_weights, "eager")
    few = normal(2 * num_frames, num_tokens, dim)
    reasons: dict[str, str] = {}
    found: dict[str, dict[str, float]] = {}
    for name in layers:
        exact = _with_gradient(exact_layers[name], few.double())

        def compare(name: str = name, exact: dict[str, Tensor] = exact) -> None:
            found[name] = relative_errors(_with_gradient(layers[name], few), exact)

        why = failure(compare) or fault(found[name], dtype)
        if why:
            reasons[name] = why
    facts: dict[str, Any] = {
        "suite": "gpu",
        "part": "layer",
        "shape": f"layer, B = {batch}",
        "batch": batch,
        "num_frames": num_frames,
        "num_tokens": num_tokens,
        "num_heads": num_heads,
        "dim": dim,
        "dtype": str(dtype).removeprefix("torch."),
    }
    sets = [(normal(batch * num_frames, num_tokens, dim),) for _ in range(2)]
    grads = [normal(*tokens.shape) for (tokens,) in sets]
    parameters = tuple(weights.parameters())
    able = {
        name: Contender(layer, sets, grads, parameters)
        for name, layer in layers.items()
        if name not in reasons
    }
    rows = []
    for of_pass in PASSES[:2]:
        result = race(able, of_pass, clock, seconds)
        rows += rows_of(result, {**facts, "pass": of_pass}, list(layers), reasons, found)
    return rows


def _with_gradient(layer: Layer, tokens: Tensor) -> dict[str, Tensor]:
    """The layer's output, and the gradient of its squares' sum."""
    leaf = tokens.detach().requires_grad_()
    output = layer(leaf)
    (gradient,) = torch.autograd.grad(output, leaf, output.detach())
    return {"output": output.detach(), "gradient": gradient}
