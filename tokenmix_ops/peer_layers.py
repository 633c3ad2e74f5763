"""What a layer is compared with: plain attention, the naive gather, BLIP's own; and their times.

Layers take tokens [batch * num_frames, num_tokens, dim], return the same shape, and share their
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tokenmix_ops.backends import Explanation, cpu
from tokenmix_ops.functional import explain
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.modules import TokenMixAttention
from tokenmix_ops.peers import naive_gather
from tokenmix_ops.timing import Timings, environment, figures, ratio, time_side_by_side

Layer = Callable[[Tensor], Tensor]


class SpatialSDPA(nn.Module):
    """Plain attention inside each frame through PyTorch's fused attention."""

    def __init__(self, weights: TokenMixAttention) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = weights.qkv, weights.proj, weights.num_heads

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class NaiveGather(nn.Module):
    """The authors' published way: everything projected, then `naive_gather`."""

    def __init__(self, weights: TokenMixAttention, cross_frame_gain: float = 0.8) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = weights.qkv, weights.proj, weights.num_heads
        self.num_frames, self.cross_frame_gain = weights.num_frames, cross_frame_gain

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.unflatten(0, (-1, self.num_frames)).unbind(3)
        mixed = naive_gather(query, key, value, self.cross_frame_gain)
        return self.proj(mixed.reshape(*tokens.shape))


def blip_layer(weights: TokenMixAttention, dim: int) -> Layer:
    """transformers' own BLIP attention, a plain product and softmax inside each frame."""
    from transformers import BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipAttention

    layer = BlipAttention(BlipVisionConfig(hidden_size=dim, num_attention_heads=weights.num_heads))
    layer.qkv, layer.projection = weights.qkv, weights.proj
    return lambda tokens: layer(tokens)[0]


def mixing_layer(weights: TokenMixAttention, mixing: Mixing, backend: str | None = None) -> Layer:
    """This project's layer on the given weights."""
    dim = weights.qkv.in_features
    layer = TokenMixAttention(
        dim, weights.num_heads, weights.num_frames, mixing, backend=backend, device="meta"
    )
    layer.qkv, layer.proj = weights.qkv, weights.proj
    return layer


def layers_on(
    weights: TokenMixAttention, backend: str | None = None, with_eager: bool = False
) -> dict[str, Layer]:
    """The layers by name, on the same weights; ``backend`` is that of this project's.

    BLIP's own is among them if transformers is installed, and this project's on the eager backend
    too, ``with_eager``.
    """
    layers: dict[str, Layer] = {}
    if find_spec("transformers"):
        layers["blip"] = blip_layer(weights, weights.dim)
    layers["spatial_sdpa"] = SpatialSDPA(weights)
    layers["naive_gather"] = NaiveGather(weights)
    for prefix, its_backend in (("eager_", "eager"), ("", backend)):
        for name, gain in GAINS.items():
            if with_eager or not prefix:
                mixing = Mixing.released(cross_frame_gain=gain)
                layers[prefix + name] = mixing_layer(weights, mixing, its_backend)
    return layers


GAINS = {"token_mixing_gain_off": 1.0, "token_mixing": 0.8}
"""This project's layers, and the `Mixing.cross_frame_gain` of each."""
LAYER_TITLES = {
    "blip": "BLIP's own, transformers",
    "spatial_sdpa": "plain spatial, SDPA",
    "naive_gather": "naive gather, gain 0.8",
    "eager_token_mixing_gain_off": "token mixing, gain off, eager",
    "eager_token_mixing": "token mixing, gain 0.8, eager",
    "token_mixing_gain_off": "token mixing, gain off",
    "token_mixing": "token mixing, gain 0.8",
}


LAYER_SHAPE = {"batch": 2, "num_frames": 8, "num_tokens": 197, "dim": 768}
LAYER_HEADS = 12
"""One attention layer of BLIP ViT-B/16, and what it is timed on."""


def blip_sized_layers() -> dict[str, Layer]:
    """`layers_on` random weights of BLIP ViT-B/16's size, for 8 frames, on a CPU.

    Those on the eager backend stand apart only where the others are on another one.
    """
    torch.manual_seed(0)
    dim, num_frames = LAYER_SHAPE["dim"], LAYER_SHAPE["num_frames"]
    weights = TokenMixAttention(dim, LAYER_HEADS, num_frames)
    return layers_on(weights, with_eager=_explained().backend != "eager")


def about_backend() -> str:
    """A sentence on what computes this project's layers of `blip_sized_layers`."""
    explained = _explained()
    if explained.backend == cpu.name:
        isa, _ = cpu.instruction_sets()
        return (
            f"Token mixing runs on the C++ kernel for CPUs ({cpu.in_words(isa)}); "
            '"eager" is the same in plain PyTorch.'
        )
    reason = explained.others.get(cpu.name, "").removeprefix("not used: ")
    name = repr(explained.backend)
    return f"Token mixing runs on the backend {name}, not on the C++ kernel: {reason}."


def _explained() -> Explanation:
    sizes = (LAYER_SHAPE[name] for name in ("num_frames", "num_tokens"))
    heads = torch.empty(1, *sizes, LAYER_HEADS, LAYER_SHAPE["dim"] // LAYER_HEADS)
    return explain(heads, heads, heads, Mixing.released())


def time_layers(
    layers: dict[str, Layer],
    *,
    batch: int,
    num_frames: int,
    num_tokens: int,
    dim: int,
    rounds: int,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Timings]:
    """Seconds of layers on the CPU by name, of passes "forward" and "forward + backward".

    ``progress`` is called with the rounds done and their total.
    """
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


def layer_rows(timings: dict[str, Timings]) -> list[dict[str, Any]]:
    """Rows of data of `time_layers` at `LAYER_SHAPE`."""
    return [
        {
            "suite": "layer",
            "device": "cpu",
            "dtype": "float32",
            **LAYER_SHAPE,
            "num_heads": LAYER_HEADS,
            "pass": name,
            "contender": contender,
            **figures(seconds),
            **environment(),
        }
        for name, of_pass in timings.items()
        for contender, seconds in of_pass.items()
    ]


def summary(timings: dict[str, Timings]) -> list[tuple[str, ...]]:
    """Lines of a table of `time_layers`: the layer, milliseconds of each pass, and how many times
    faster than plain spatial attention each pass is."""
    lines = []
    for name in timings["forward"]:
        times = [f"{1e3 * median(of_pass[name]):.0f} ms" for of_pass in timings.values()]
        speed = [ratio(of_pass, "spatial_sdpa", name)[0] for of_pass in timings.values()]
        lines.append((LAYER_TITLES[name], *times, " / ".join(f"{s:.2f}×" for s in speed)))
    return lines
