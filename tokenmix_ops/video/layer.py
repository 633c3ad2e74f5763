"""A BLIP ViT layer for videos, with slots for adapters and an option to compute only [CLS]."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.blip.modeling_blip import BlipEncoderLayer

from tokenmix_ops.modules import Queries


class VideoLayer(BlipEncoderLayer):
    """A BLIP ViT layer that reuses the original's modules and this package's attention.

    ``before_attention`` and ``before_ffn`` map [batch * num_frames, num_tokens, dim] to the same
    shape and start as None: tuning methods put adapters there. ``drop_path`` is the probability
    that a frame skips a branch during training (stochastic depth).

    Args:
        original: the layer to replace; state dict names stay the same.
    """

    def __init__(self, original: BlipEncoderLayer) -> None:
        nn.Module.__init__(self)
        self.layer_norm1 = original.layer_norm1
        self.self_attn: Any = original.self_attn
        self.layer_norm2, self.mlp = original.layer_norm2, original.mlp
        self.before_attention: nn.Module | None = None
        self.before_ffn: nn.Module | None = None
        self.drop_path = 0.0
        self.training = original.training

    def forward(
        self, hidden_states: Tensor, *args: Any, queries: Queries = "all", **kwargs: Any
    ) -> Tensor:
        """[batch * num_frames, num_tokens, dim] in and out; ``"prefix"`` returns only [CLS].

        The attention ignores or refuses further arguments from transformers.
        """
        if self.before_attention is not None:
            hidden_states = self.before_attention(hidden_states)
        attended, _ = self.self_attn(
            self.layer_norm1(hidden_states), *args, queries=queries, **kwargs
        )
        if queries == "prefix":
            hidden_states = hidden_states[:, : attended.shape[1]]
        hidden_states = hidden_states + self._dropped(attended)
        if self.before_ffn is not None:
            hidden_states = self.before_ffn(hidden_states)
        return hidden_states + self._dropped(self.mlp(self.layer_norm2(hidden_states)))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return branch
        kept = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1 - self.drop_path)
        return branch * (kept / (1 - self.drop_path))
