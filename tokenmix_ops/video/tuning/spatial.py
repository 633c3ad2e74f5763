"""Plain attention within frames; chosen layers are updated, the last by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import nn

from tokenmix_ops.video.tuning.method import (
    Setting,
    Switches,
    TuningMethod,
    VideoModel,
    layer_parts,
    parameters_of,
)
from tokenmix_ops.video.tuning.spec import Tuning


class SpatialTuning(TuningMethod):
    """Nothing is new: what token mixing is compared with in Table 3."""

    name = "spatial"
    takes: ClassVar[tuple[str, ...]] = ("layers",)
    last_layer_only = True
    settings: ClassVar[tuple[Setting, ...]] = (
        Setting("spatial (P)", Tuning("spatial")),
        Setting("spatial (F)", Tuning("spatial", everything=True)),
    )

    def updated(
        self, model: VideoModel, layers: tuple[int, ...], switches: Switches
    ) -> Iterable[nn.Parameter]:
        chosen = [model.encoder.layers[index] for index in layers]
        return parameters_of(part for layer in chosen for part in layer_parts(layer, switches))


METHOD = SpatialTuning()
