"""Full fine-tuning with temporal blocks on top, the paper's "Fully (ViViT)"."""

from __future__ import annotations

from torch import Tensor

from tokenmix_ops.video.tuning.method import Setting, Switches
from tokenmix_ops.video.tuning.spec import Tuning
from tokenmix_ops.video.tuning.temporal import TemporalTuning

TEXT_LAYERS = ("text_decoder.bert.encoder.layer.", "text_encoder.encoder.layer.")


class FullTuning(TemporalTuning):
    """The blocks of `TemporalTuning`, and everything is updated, the text side too.

    Source: ViViT, Arnab et al., ICCV 2021.
    """

    name = "full"
    switches = Switches(everything=True)
    settings = (
        Setting(
            "full", Tuning("full"), 226.5, 226.51, "the layers of the text side are counted too"
        ),
    )

    def counts(self, name: str, parameter: Tensor, switches: Switches) -> bool:
        in_text = switches.everything and parameter.dim() > 1 and name.startswith(TEXT_LAYERS)
        return in_text or super().counts(name, parameter, switches)


METHOD = FullTuning()
