"""Dual attention: a temporal attention beside the spatial one, mixed in by a learnt gate."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from tokenmix_ops.convert import mix_tokens
from tokenmix_ops.modules import Queries
from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.tuning.method import (
    Setting,
    Switches,
    TuningMethod,
    VideoModel,
    parameters_of,
)
from tokenmix_ops.video.tuning.spec import Tuning
from tokenmix_ops.video.tuning.temporal import FramePosition

_WHOLE_LAYERS = (
    "the text says that only the temporal attention is updated; the figure counts whole layers"
)


class DualAttention(nn.Module):
    """spatial(x) + tanh(gate) · temporal(x), the gate at 0 at first.

    Args:
        spatial, temporal: attention layers that return (output, weights).
        position: added to what the temporal one reads, or None.
    """

    def __init__(
        self, spatial: nn.Module, temporal: nn.Module, position: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.spatial, self.temporal, self.position = spatial, temporal, position
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, hidden_states: Tensor, *args: Any, queries: Queries | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """[batch * num_frames, num_tokens, dim] in and out; only [CLS] out for ``"prefix"``."""
        across = hidden_states if self.position is None else self.position(hidden_states)
        spatial, _weights = self.spatial(hidden_states, *args, queries=queries, **kwargs)
        temporal, _weights = self.temporal(across, *args, queries=queries, **kwargs)
        return spatial + self.gate.tanh() * temporal, None


class DualAttentionTuning(TuningMethod):
    """Updates the temporal attentions and the gates; with ``ffn`` on, the layers' FFNs as well.

    The paper's text says "only the temporal attention", 28.3 M, which is the default; its number,
    84.9 M, is that of twelve whole layers: attention and FFN. Source: Token Mixing, Table 1.
    """

    name = "dual_attention"
    takes = ("layers", "temporal_position")
    switches = Switches(ffn=False)
    settings = (
        Setting(
            "dual_attention, as the text says", Tuning("dual_attention"), 84.9, note=_WHOLE_LAYERS
        ),
        Setting(
            "dual_attention, as the figure says",
            Tuning("dual_attention", ffn=True),
            84.9,
            note=_WHOLE_LAYERS,
        ),
    )

    def insert(self, encoder: VideoEncoder, tuning: Tuning, layers: tuple[int, ...]) -> None:
        temporal = deepcopy(encoder)
        mix_tokens(temporal.vision_model, encoder.num_frames, "temporal", layers="all")
        for index in layers:
            layer = encoder.layers[index]
            position = None
            if tuning.temporal_position and index == layers[0]:
                position = FramePosition(encoder.num_frames, encoder.config.hidden_size)
            layer.self_attn = DualAttention(
                layer.self_attn, temporal.layers[index].self_attn, position
            )

    def updated(
        self, model: VideoModel, layers: tuple[int, ...], switches: Switches
    ) -> Iterable[nn.Parameter]:
        parts: list[nn.Module] = []
        gates: list[nn.Parameter] = []
        for layer in (model.encoder.layers[index] for index in layers):
            if switches.attention:
                parts += [layer.self_attn.temporal]
                parts += [layer.self_attn.position] * (layer.self_attn.position is not None)
                gates.append(layer.self_attn.gate)
            if switches.ffn:
                parts += [layer.layer_norm2, layer.mlp]
        return parameters_of(parts) + gates


METHOD = DualAttentionTuning()
