"""Whole attention layers, projections included: ours, the plain one, the naive gather."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.passes import (
    BACKENDS,
    PASSES,
    Begin,
    Contender,
    checked,
    failure,
    fault,
    race,
    relative_errors,
    rows_of,
)
from bench.rows import Row
from tokenmix_ops.functional import token_mix_attention
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.modules import TokenMixAttention
from tokenmix_ops.peer_layers import GAINS, Layer, layers_on
from tokenmix_ops.testing import Case
from tokenmix_ops.timing import Clock


class CheckedLayers:
    """Layers on the same random weights; ``reasons`` names those that compute something else.

    ``backend`` is that of this project's layers, which are there on the eager one too,
    ``with_eager``. Each layer is compared with itself in float64 on
    the eager backend, with the gradients of tokens and parameters, and the kernel of ours is held
    to the computed tolerance besides.
    """

    def __init__(
        self,
        num_frames: int,
        num_tokens: int,
        num_heads: int,
        dim: int,
        device: str,
        dtype: torch.dtype,
        backend: str,
        begin: Begin = lambda contender, of_pass: None,
        with_eager: bool = False,
    ) -> None:
        self.sizes = (num_frames, num_tokens, dim)
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)
        torch.manual_seed(0)
        weights = TokenMixAttention(dim, num_heads, num_frames, device=device, dtype=dtype)
        exact_weights = TokenMixAttention(
            dim, num_heads, num_frames, device=device, dtype=torch.float64
        )
        exact_weights.load_state_dict(weights.state_dict())
        self.parameters = tuple(weights.parameters())
        self.names = tuple(name for name, _ in weights.named_parameters())
        self.exact_parameters = tuple(exact_weights.parameters())
        self.layers = layers_on(weights, backend, with_eager)
        exact = layers_on(exact_weights, "eager", with_eager)
        self.errors: dict[str, dict[str, float]] = {}
        self.reasons: dict[str, str] = {}
        few = self._tokens(2)
        for name in self.layers:
            begin(name, "forward")
            why = failure(partial(self._compare, name, few, exact[name]))
            why = why or fault(self.errors[name], dtype)
            ours = name.removeprefix("eager_")
            if not why and ours in GAINS:
                mixing = Mixing.released(cross_frame_gain=GAINS[ours])
                shape = {"num_frames": num_frames, "num_tokens": num_tokens, "num_heads": num_heads}
                head_dim = dim // num_heads
                case = Case(mixing, batch=2, head_dim=head_dim, layout="selected", **shape)
                why = kernel_fault(case, dtype, device, backend if ours == name else "eager")
            if why:
                self.reasons[name] = why

    def contenders(self, batch: int) -> dict[str, Contender]:
        """Those that are right, on two sets of inputs."""
        sets = [(self._tokens(batch),) for _ in range(2)]
        grads = [self._tokens(batch) for _ in sets]
        return {
            name: Contender(layer, sets, grads, self.parameters)
            for name, layer in self.layers.items()
            if name not in self.reasons
        }

    def _tokens(self, batch: int) -> Tensor:
        num_frames, num_tokens, dim = self.sizes
        shape = (batch * num_frames, num_tokens, dim)
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def _compare(self, name: str, tokens: Tensor, exact: Layer) -> None:
        wanted = self._results(exact, tokens.double(), self.exact_parameters)
        found = self._results(self.layers[name], tokens, self.parameters)
        self.errors[name] = relative_errors(found, wanted)

    def _results(
        self, layer: Layer, tokens: Tensor, parameters: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """The layer's output, and the gradients of half the sum of its squares."""
        leaf = tokens.detach().requires_grad_()
        output = layer(leaf)
        grads = torch.autograd.grad(output, (leaf, *parameters), output.detach())
        names = (f"{name} gradient" for name in ("tokens", *self.names))
        return {"output": output.detach(), **dict(zip(names, grads, strict=True))}


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
    rounds: int | None = None,
    begin: Begin = lambda contender, of_pass: None,
    with_eager: bool = False,
) -> list[Row]:
    """Rows of every layer, forward and forward + backward, parameters' gradients included.

    Each pass takes about so many ``seconds``, or ``rounds``. Layers that `CheckedLayers` finds
    wrong are not timed. ``begin`` is told who runs next.
    """
    layers = CheckedLayers(
        num_frames, num_tokens, num_heads, dim, device, dtype, backend, begin, with_eager
    )
    facts: dict[str, Any] = {
        "batch": batch,
        "num_frames": num_frames,
        "num_tokens": num_tokens,
        "num_heads": num_heads,
        "dim": dim,
        "dtype": str(dtype).removeprefix("torch."),
    }
    able = layers.contenders(batch)
    rows = []
    for of_pass in PASSES[:2]:
        result = race(able, of_pass, clock, seconds, rounds, begin)
        rows += rows_of(
            result, {**facts, "pass": of_pass}, list(layers.layers), layers.reasons, layers.errors
        )
    return rows


def kernel_fault(case: Case, dtype: torch.dtype, device: str, backend: str) -> str | None:
    """What is wrong with a backend's result for a case, by the computed tolerance."""
    inputs, plan = case.inputs(dtype, device), case.plan_on(device)
    call = partial(token_mix_attention, mixing=plan, backend=backend)
    generator = torch.Generator(device).manual_seed(1)
    grad = torch.randn(inputs[0].shape, generator=generator, device=device, dtype=dtype)
    detached = tuple(t.detach() for t in inputs)
    contender = Contender(call, [detached], [grad])
    _, forward, backward = checked(contender, plan, dtype, arithmetic=BACKENDS[backend])
    return forward or backward
