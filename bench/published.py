"""A video captioner computed as the authors published it: the same weights, nothing fused."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from tokenmix_ops.arguments import refuse_others
from tokenmix_ops.convert import ConvertedAttention
from tokenmix_ops.modules import Queries, TokenMixing
from tokenmix_ops.peers import naive_gather
from tokenmix_ops.video.captioning import VideoCaptioner
from tokenmix_ops.video.cross_attention import CrossAttention, VideoMemory


class PublishedAttention(TokenMixing):
    """An attention layer of the tower: a product and a softmax, logits and weights in memory.

    Layers that do not mix are transformers' own, as are temporal ones, with the frames of a patch
    as the sequence; those that mix project every token and go through `naive_gather`.

    Args:
        layer: what it replaces, on whose parameters it stands; of the ``spatial``, ``temporal`` or
            ``released`` mixing, else ValueError is raised.
    """

    def __init__(self, layer: ConvertedAttention) -> None:
        super().__init__(
            num_heads=layer.num_heads,
            num_frames=layer.num_frames,
            mixing=layer.mixing,
            num_prefix_tokens=layer.num_prefix_tokens,
            projection=layer.qkv_projection,
        )
        if self.mixing.kind not in ("spatial", "temporal", "released"):
            raise ValueError(f"the authors published no way to compute {self.mixing!r}")
        self.original: Any = layer.restored()

    def forward(
        self, hidden_states: Tensor, *args: Any, queries: Queries = "all", **kwargs: Any
    ) -> tuple[Tensor, None]:
        """[batch * num_frames, num_tokens, dim] in and out, all rows whatever ``queries``."""
        refuse_others("the published attention", hidden_states, args, kwargs)
        if self.mixing.kind == "spatial":
            return self.original(hidden_states)[0], None
        video = hidden_states.unflatten(0, (-1, self.num_frames))
        if self.mixing.kind == "temporal":
            patches = video.transpose(1, 2)
            attended = self.original(patches.flatten(0, 1))[0]
            return attended.unflatten(0, patches.shape[:2]).transpose(1, 2).flatten(0, 1), None
        qkv = self.original.qkv(video).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.unbind(3)
        mixed = naive_gather(query, key, value, self.mixing.cross_frame_gain)
        return self.original.projection(mixed.reshape(hidden_states.shape)), None


class PublishedCrossAttention(nn.Module):
    """The decoder's cross-attention as transformers computes it."""

    def __init__(self, layer: CrossAttention, config: Any) -> None:
        super().__init__()
        self.original = BlipTextSelfAttention(config, is_cross_attention=True)
        self.original.query, self.original.key = layer.query, layer.key
        self.original.value, self.original.dropout = layer.value, layer.dropout

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        encoder_hidden_states: Tensor | VideoMemory | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[videos, length, dim] in and out, one text a video."""
        refuse_others("the published cross-attention", hidden_states, args, kwargs)
        tokens = encoder_hidden_states
        tokens = tokens.tokens if isinstance(tokens, VideoMemory) else tokens
        return self.original(hidden_states, encoder_hidden_states=tokens)[0], None


def as_published(model: VideoCaptioner) -> VideoCaptioner:
    """Swaps all attention layers for the authors' way, in place; returns the model.

    Parameters stay the same objects. Raises ValueError for a mixing that they did not publish.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ConvertedAttention):
                setattr(parent, name, PublishedAttention(child))
            elif isinstance(child, CrossAttention):
                config = model.blip_config.text_config
                parent.add_module(name, PublishedCrossAttention(child, config))
    return model
