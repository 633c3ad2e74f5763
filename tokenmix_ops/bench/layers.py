"""The attention layers that are compared: the same weights, computed in different ways.

Each takes tokens [batch * num_frames, num_tokens, dim] and returns the same shape.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

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
    """The authors' published way: everything projected, keys indexed, logits masked, in float32.

    At every forward the index is rebuilt, and a mask as large as the logits [batch, num_heads,
    num_frames * num_tokens, num_keys]; keys lie grouped by frame.
    """

    def __init__(self, weights: TokenMixAttention, cross_frame_gain: float = 0.8) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = weights.qkv, weights.proj, weights.num_heads
        self.num_frames, self.cross_frame_gain = weights.num_frames, cross_frame_gain

    def forward(self, tokens: Tensor) -> Tensor:
        num_frames, num_tokens = self.num_frames, tokens.shape[1]
        batch = tokens.shape[0] // num_frames
        qkv = self.qkv(tokens).reshape(batch, num_frames * num_tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        patches = torch.arange(num_tokens - 1, device=tokens.device)
        groups = [patches[patches % num_frames == source] for source in range(num_frames)]
        index = [torch.arange(num_frames, device=tokens.device) * num_tokens]
        index += [source * num_tokens + 1 + group for source, group in enumerate(groups)]
        keys = torch.cat(index)
        logits = query.float() @ key[:, :, keys].float().transpose(-2, -1)
        logits = logits * query.shape[-1] ** -0.5
        unscaled = torch.zeros(logits.shape, device=tokens.device)
        unscaled[..., :num_frames] = 1
        start = num_frames
        for source, group in enumerate(groups):
            rows = slice(source * num_tokens, (source + 1) * num_tokens)
            unscaled[:, :, rows, start : start + len(group)] = 1
            start += len(group)
        logits = logits * (unscaled + (1 - unscaled) * self.cross_frame_gain)
        weights = logits.softmax(dim=-1).to(value.dtype)
        mixed = (weights @ value[:, :, keys]).transpose(1, 2)
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
    weights = TokenMixAttention(dim, num_heads, num_frames)
    layers: dict[str, Layer] = {}
    if find_spec("transformers"):
        layers["blip"] = blip_layer(weights, dim)
    layers["spatial_sdpa"] = SpatialSDPA(weights)
    layers["naive_gather"] = NaiveGather(weights)
    layers["token_mixing_gain_off"] = mixing_layer(weights, Mixing.released(cross_frame_gain=1.0))
    layers["token_mixing"] = mixing_layer(weights, Mixing.released())
    return layers


TITLES = {
    "blip": "BLIP's own, transformers",
    "spatial_sdpa": "plain spatial, SDPA",
    "naive_gather": "naive gather, gain 0.8",
    "token_mixing_gain_off": "token mixing, gain off",
    "token_mixing": "token mixing, gain 0.8",
}
