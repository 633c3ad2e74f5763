"""Temporal blocks on top of the image ViT: each patch position attends over the frames."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn

from tokenmix_ops.convert import mix_tokens
from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.tuning.method import (
    Setting,
    Switches,
    TuningMethod,
    VideoModel,
    layer_parts,
    parameters_of,
)
from tokenmix_ops.video.tuning.spec import Tuning


class FramePosition(nn.Module):
    """Adds a learnt vector to all tokens of a frame; at first zero."""

    def __init__(self, num_frames: int, dim: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.position = nn.Parameter(torch.zeros(num_frames, 1, dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch * num_frames, num_tokens, dim] in and out.

        Raises ValueError after `VideoEncoder.set_num_frames`: there is one position per frame.
        """
        if self.num_frames != self.position.shape[0]:
            raise ValueError(
                f"temporal_position has {self.position.shape[0]} frames, but the encoder is set to "
                f"{self.num_frames}: build it with the number of frames that it is used with"
            )
        video = hidden_states.unflatten(0, (-1, self.num_frames))
        return (video + self.position).flatten(0, 1)


class TemporalTuning(TuningMethod):
    """Four blocks, initialised from the last spatial ones, are added and updated.

    Without a temporal position they are equivariant to the order of frames, as published.
    Source: ViViT's factorised encoder (Arnab et al., ICCV 2021), on a frozen tower.
    """

    name = "temporal"
    takes = ("num_blocks", "temporal_position")
    settings = (Setting("temporal", Tuning("temporal"), 28.3, 28.31),)

    def insert(self, encoder: VideoEncoder, tuning: Tuning, layers: tuple[int, ...]) -> None:
        depth = len(encoder.layers)
        num_blocks = min(4, depth) if tuning.num_blocks is None else tuning.num_blocks
        if not 1 <= num_blocks <= depth:
            raise ValueError(f"num_blocks = {num_blocks} must be 1 to {depth}, the depth")
        blocks = [deepcopy(layer) for layer in encoder.layers[-num_blocks:]]
        encoder.vision_model.encoder.layers.extend(blocks)
        new = range(depth, depth + len(blocks))
        mix_tokens(encoder.vision_model, encoder.num_frames, "temporal", layers=new)
        if tuning.temporal_position:
            dim = encoder.config.hidden_size
            encoder.layers[depth].before_attention = FramePosition(encoder.num_frames, dim)

    def updated(
        self, model: VideoModel, layers: tuple[int, ...], switches: Switches
    ) -> Iterable[nn.Parameter]:
        blocks = model.encoder.layers[model.encoder.config.num_hidden_layers :]
        parts = [part for block in blocks for part in layer_parts(block, switches)]
        parts += [block.before_attention for block in blocks if block.before_attention is not None]
        return parameters_of(parts)


METHOD = TemporalTuning()
