"""Cross-attention from texts to videos that computes keys and values once per video and layer.

transformers computes them for every beam and every matched text, and copies them when beams are
reordered. Here all texts of a video form the queries of one product.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tokenmix_ops.arguments import refuse_others


class VideoMemory:
    """Video tokens for a text model's cross-attention, with cached keys and values per layer.

    Pass it as ``encoder_hidden_states``. Reuse it when generating or matching several texts per
    video, so that each layer projects the video's tokens only once.

    Args:
        tokens: [videos, num_tokens, dim].
    """

    def __init__(self, tokens: Tensor) -> None:
        if tokens.dim() != 3:
            raise ValueError(f"expected tokens [videos, num_tokens, dim], got {list(tokens.shape)}")
        self.tokens = tokens
        self._of_layer: dict[CrossAttention, tuple[Tensor, Tensor]] = {}

    @property
    def num_videos(self) -> int:
        return self.tokens.shape[0]

    def of(self, layer: CrossAttention) -> tuple[Tensor, Tensor]:
        """Key and value for a layer, each [videos, num_heads, num_tokens, head_dim]."""
        if layer not in self._of_layer:
            self._of_layer[layer] = (
                layer.split_heads(layer.key(self.tokens)),
                layer.split_heads(layer.value(self.tokens)),
            )
        return self._of_layer[layer]

    def select(self, index: Tensor) -> VideoMemory:
        """Select videos by ``index`` [n]; reuses the keys and values computed so far."""
        chosen = VideoMemory(self.tokens[index])
        chosen._of_layer = {
            layer: (key[index], value[index]) for layer, (key, value) in self._of_layer.items()
        }
        return chosen


class CrossAttention(nn.Module):
    """A BLIP text layer's cross-attention: the original's parameters, fused attention.

    Args:
        original: the transformers layer to replace; state dict names stay the same.
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
        """[videos * n, length, dim] for ``n`` texts per video, grouped by video.

        ``encoder_hidden_states``: a `VideoMemory`, or video tokens [videos, num_tokens, dim]. A
        memory is recognised by its type under any argument name. transformers' cache is not used:
        the memory holds a video's keys. Raises ValueError for any argument that could change the
        result (`refuse_others`), such as a mask, even one that hides nothing, and if the number of
        texts is not a multiple of the number of videos.
        """
        others = {name: value for name, value in kwargs.items() if not _is_place(name, value)}
        # hidden_states is refused too: as keys, texts would be read in place of the videos.
        refuse_others("cross-attention to videos", None, args, others)
        if encoder_hidden_states is None:
            passed = (*args, *kwargs.values())
            encoder_hidden_states = next((v for v in passed if isinstance(v, VideoMemory)), None)
        if encoder_hidden_states is None:
            raise ValueError("cross-attention needs videos: pass them as encoder_hidden_states")
        if isinstance(encoder_hidden_states, Tensor):
            encoder_hidden_states = VideoMemory(encoder_hidden_states)
        videos = encoder_hidden_states.num_videos
        texts, length, _ = hidden_states.shape
        if not videos or texts % videos:
            raise ValueError(
                f"expected the number of texts to be a multiple of {videos} videos, got {texts}"
            )
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
    """Whether an argument holds word positions, which have no effect: words read all tokens."""
    places = name in ("cache_position", "position_ids")
    return places and isinstance(value, Tensor) and not value.is_floating_point()


def share_video_keys(text_model: nn.Module) -> None:
    """Replace the cross-attention in every layer of a BLIP text model with `CrossAttention`.

    Raises ValueError if the model has none, because its configuration lacks ``is_decoder``.
    """
    found: list[Any] = [
        module for name, module in text_model.named_modules() if name.endswith(".crossattention")
    ]
    if not found:
        raise ValueError(
            f"{type(text_model).__name__} has no cross-attention: set is_decoder in its config"
        )
    for attention in found:
        if not isinstance(attention.self, CrossAttention):
            attention.add_module("self", CrossAttention(attention.self))
