"""Cross-attention of texts to videos whose keys and values are computed once a video and layer.

transformers computes them for each beam of a video and each text that is matched with it, and
copies them whenever beams change places. Here all texts of a video are queries of one product.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tokenmix_ops.arguments import refuse_others


class VideoMemory:
    """Videos as a text model's cross-attention reads them: tokens, and keys and values by layer.

    Pass it as ``encoder_hidden_states``. Whoever generates or matches many texts of a video keeps
    one, so that each layer projects the video's tokens once.

    Args:
        tokens: [videos, num_tokens, dim].
    """

    def __init__(self, tokens: Tensor) -> None:
        if tokens.dim() != 3:
            raise ValueError(f"tokens must be [videos, num_tokens, dim], got {list(tokens.shape)}")
        self.tokens = tokens
        self._of_layer: dict[CrossAttention, tuple[Tensor, Tensor]] = {}

    @property
    def num_videos(self) -> int:
        return self.tokens.shape[0]

    def of(self, layer: CrossAttention) -> tuple[Tensor, Tensor]:
        """Key and value of a layer, each [videos, num_heads, num_tokens, head_dim]."""
        if layer not in self._of_layer:
            self._of_layer[layer] = (
                layer.split_heads(layer.key(self.tokens)),
                layer.split_heads(layer.value(self.tokens)),
            )
        return self._of_layer[layer]

    def select(self, index: Tensor) -> VideoMemory:
        """The videos ``index`` [n]; what was computed already is picked, not computed again."""
        chosen = VideoMemory(self.tokens[index])
        chosen._of_layer = {
            layer: (key[index], value[index]) for layer, (key, value) in self._of_layer.items()
        }
        return chosen


class CrossAttention(nn.Module):
    """A BLIP text layer's cross-attention, on the original's own parameters and by fused means.

    Args:
        original: transformers' layer that it replaces; names in state dicts stay the same.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = original.query, original.key, original.value
        self.dropout = original.dropout
        self.num_heads = original.num_attention_heads
        self.training = original.training

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        encoder_hidden_states: Tensor | VideoMemory | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[videos * n, length, dim] for ``n`` texts a video, those of a video in a row.

        ``encoder_hidden_states``: a `VideoMemory` of the videos, or their tokens [videos,
        num_tokens, dim]. A memory is known by its type, whatever the argument is called. What else
        transformers passes, such as its cache, is left alone: a video's keys stay in its memory.
        Raises ValueError for what could change the result (`refuse_others`), such as a mask, even
        one that hides nothing, and for texts that cannot be shared out among the videos.
        """
        others = {name: value for name, value in kwargs.items() if not _is_place(name, value)}
        # Not even the texts themselves: as keys they would be others than the videos.
        refuse_others("cross-attention to videos", None, args, others)
        if encoder_hidden_states is None:
            passed = (*args, *kwargs.values())
            encoder_hidden_states = next((v for v in passed if isinstance(v, VideoMemory)), None)
        if encoder_hidden_states is None:
            raise ValueError("cross-attention needs the videos as encoder_hidden_states")
        if isinstance(encoder_hidden_states, Tensor):
            encoder_hidden_states = VideoMemory(encoder_hidden_states)
        videos = encoder_hidden_states.num_videos
        texts, length, _ = hidden_states.shape
        if not videos or texts % videos:
            raise ValueError(f"{texts} texts cannot be shared out among {videos} videos")
        key, value = encoder_hidden_states.of(self)
        query = self.query(hidden_states).unflatten(0, (videos, -1)).flatten(1, 2)
        attended = scaled_dot_product_attention(
            self.split_heads(query),
            key,
            value,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        merged = attended.transpose(1, 2).flatten(2)
        return merged.reshape(texts, length, -1), None

    def split_heads(self, features: Tensor) -> Tensor:
        """[n, length, dim] to [n, num_heads, length, head_dim]."""
        return features.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _is_place(name: str, value: Any) -> bool:
    """Whether an argument holds positions of words, which change nothing: each reads all tokens."""
    places = name in ("cache_position", "position_ids")
    return places and isinstance(value, Tensor) and not value.is_floating_point()


def share_video_keys(text_model: nn.Module) -> None:
    """Swaps the cross-attention of all layers of a BLIP text model for `CrossAttention`.

    Raises ValueError if there is none, as in a text model whose configuration is no decoder's.
    """
    found: list[Any] = [
        module for name, module in text_model.named_modules() if name.endswith(".crossattention")
    ]
    if not found:
        raise ValueError(f"{type(text_model).__name__} has no cross-attention: set is_decoder")
    for attention in found:
        if not isinstance(attention.self, CrossAttention):
            attention.add_module("self", CrossAttention(attention.self))
