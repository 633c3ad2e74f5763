"""Full fine-tuning with temporal blocks on top, the paper's "Fully (ViViT)"."""

from __future__ import annotations

from tokenmix_ops.video.tuning.method import Switches
from tokenmix_ops.video.tuning.temporal import Temporal


class Full(Temporal):
    """The blocks of `Temporal`, and everything is updated, the text side too.

    Source: ViViT, Arnab et al., ICCV 2021.
    """

    name = "full"
    switches = Switches(everything=True)
