"""The attention layers that are compared: the same weights, computed in different ways.

Each takes tokens [batch * num_frames, num_tokens, dim] and returns the same shape.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tokenmix_ops.bench.attention import naive_gather
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.modules import TokenMixAttention

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


def contenders(dim: int, num_heads: int, num_frames: int) -> dict[str, Layer]:
    """The layers by name, on the same random weights; BLIP's own only if transformers is there."""
    return layers_on(TokenMixAttention(dim, num_heads, num_frames))


def layers_on(weights: TokenMixAttention, backend: str | None = None) -> dict[str, Layer]:
    """`contenders` on given weights; ``backend`` is that of this project's layers."""
    layers: dict[str, Layer] = {}
    if find_spec("transformers"):
        layers["blip"] = blip_layer(weights, weights.dim)
    layers["spatial_sdpa"] = SpatialSDPA(weights)
    layers["naive_gather"] = NaiveGather(weights)
    for name, gain in (("token_mixing_gain_off", 1.0), ("token_mixing", 0.8)):
        layers[name] = mixing_layer(weights, Mixing.released(cross_frame_gain=gain), backend)
    return layers


TITLES = {
    "blip": "BLIP's own, transformers",
    "spatial_sdpa": "plain spatial, SDPA",
    "naive_gather": "naive gather, gain 0.8",
    "token_mixing_gain_off": "token mixing, gain off",
    "token_mixing": "token mixing, gain 0.8",
}
