"""ST-Adapters: a bottleneck with a convolution over time and space before each attention."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.tuning.method import (
    Setting,
    Switches,
    TuningMethod,
    VideoModel,
    bottleneck_of,
    parameters_of,
)
from tokenmix_ops.video.tuning.spec import Tuning


class STAdapter(nn.Module):
    """dim → bottleneck, Conv3d 3×3×3 over frames and patches, → dim, added; at first the identity.

    The convolution is dense, as the paper counts it (54.8 M over 12 layers). [CLS] passes as it
    is.
    """

    def __init__(self, dim: int, bottleneck: int, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.down = nn.Linear(dim, bottleneck)
        self.convolution = nn.Conv3d(bottleneck, bottleneck, kernel_size=3, padding=1)
        self.up = nn.Linear(bottleneck, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch * num_frames, 1 + side * side, dim] in and out."""
        patches = hidden_states[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        video = self.down(patches).unflatten(1, (side, side)).unflatten(0, (-1, self.num_frames))
        video = self.convolution(video.movedim(-1, 1)).movedim(1, -1)
        adapted = patches + self.up(video.flatten(0, 1).flatten(1, 2))
        return torch.cat([hidden_states[:, :1], adapted], dim=1)


class STAdapterTuning(TuningMethod):
    """Updates the adapters, one a layer; none with ``attention`` off.

    Source: Pan et al., ST-Adapter, NeurIPS 2022.
    """

    name = "st_adapter"
    takes = ("layers", "bottleneck")
    settings = (
        Setting("st_adapter", Tuning("st_adapter"), 54.8, note="54.854 in full, truncated"),
    )

    def insert(self, encoder: VideoEncoder, tuning: Tuning, layers: tuple[int, ...]) -> None:
        dim = encoder.config.hidden_size
        if tuning.attention is False:
            return
        bottleneck = bottleneck_of(tuning, dim // 2)
        for index in layers:
            encoder.layers[index].before_attention = STAdapter(dim, bottleneck, encoder.num_frames)

    def updated(
        self, model: VideoModel, layers: tuple[int, ...], switches: Switches
    ) -> Iterable[nn.Parameter]:
        return parameters_of(m for m in model.encoder.modules() if isinstance(m, STAdapter))


METHOD = STAdapterTuning()
