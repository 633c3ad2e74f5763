"""Token mixing: the attention of chosen layers, the last by default, mixes tokens over frames."""

from __future__ import annotations

from tokenmix_ops.convert import mix_tokens
from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.tuning.settings import Tuning
from tokenmix_ops.video.tuning.spatial import Spatial


class TokenMixing(Spatial):
    """No new parameters; (P) updates the layers that mix, (F) everything.

    Source: Liu et al., Token Mixing, AAAI 2023.
    """

    name = "token_mixing"
    takes = ("layers", "mixing")

    def insert(self, encoder: VideoEncoder, tuning: Tuning, layers: tuple[int, ...]) -> None:
        if layers:
            mix_tokens(encoder.vision_model, encoder.num_frames, tuning.mixing, layers)
