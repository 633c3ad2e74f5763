"""BitFit: every bias is updated, those of norms and of the text side included."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from tokenmix_ops.video.tuning.method import Switches, TuningMethod, VideoModel


class BitFit(TuningMethod):
    """Biases alone; with LP or LH switched on, those parts' weights too.

    Source: Ben Zaken et al., BitFit, ACL 2022.
    """

    name = "bitfit"
    switches = Switches(linear_projection=False, language_head=False)

    def updated(
        self, model: VideoModel, layers: tuple[int, ...], switches: Switches
    ) -> Iterable[nn.Parameter]:
        return [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"]
