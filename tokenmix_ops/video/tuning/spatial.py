"""Plain attention within frames; chosen layers are updated, the last by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import nn

from tokenmix_ops.video.tuning.method import (
    Switches,
    TuningMethod,
    VideoModel,
    layer_parts,
    parameters_of,
)


class Spatial(TuningMethod):
    """Nothing is new: what token mixing is compared with in Table 3."""

    name = "spatial"
    takes: ClassVar[tuple[str, ...]] = ("layers",)
    last_layer_only = True

    def updated(
        self, model: VideoModel, layers: tuple[int, ...], switches: Switches
    ) -> Iterable[nn.Parameter]:
        chosen = [model.encoder.layers[index] for index in layers]
        return parameters_of(part for layer in chosen for part in layer_parts(layer, switches))
