"""Nothing is updated: the image model as it is, frame by frame."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from tokenmix_ops.video.tuning.method import Setting, Switches, TuningMethod, VideoModel
from tokenmix_ops.video.tuning.spec import Tuning


class FrozenTuning(TuningMethod):
    """The zero-shot baseline; switches still turn LP and LH on."""

    name = "frozen"
    switches = Switches(False, False, False, False)
    settings = (Setting("frozen", Tuning("frozen"), note="not in the paper"),)

    def updated(
        self, model: VideoModel, layers: tuple[int, ...], switches: Switches
    ) -> Iterable[nn.Parameter]:
        return ()


METHOD = FrozenTuning()
