"""BitFit: every bias is updated, those of norms and of the text side included."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from tokenmix_ops.video.tuning.method import Setting, Switches, TuningMethod, VideoModel
from tokenmix_ops.video.tuning.spec import Tuning


class BitFitTuning(TuningMethod):
    """Biases alone; with LP or LH switched on, those parts' weights too.

    Source: Ben Zaken et al., BitFit, ACL 2022.
    """

    name = "bitfit"
    switches = Switches(linear_projection=False, language_head=False)
    updates_final_norm = False
    settings = (
        Setting("bitfit", Tuning("bitfit"), 0.3, 0.26, "all biases, those of the text side too"),
    )

    def updated(
        self, model: VideoModel, layers: tuple[int, ...], switches: Switches
    ) -> Iterable[nn.Parameter]:
        return [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"]

    def counts(self, name: str, parameter: Tensor, switches: Switches) -> bool:
        return True


METHOD = BitFitTuning()
