"""Token mixing: the attention of chosen layers, the last by default, mixes tokens over frames."""

from __future__ import annotations

from tokenmix_ops.convert import mix_tokens
from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.tuning.method import Setting
from tokenmix_ops.video.tuning.spatial import SpatialTuning
from tokenmix_ops.video.tuning.spec import Tuning


class TokenMixingTuning(SpatialTuning):
    """No new parameters; (P) updates the layers that mix, (F) everything.

    Source: Liu et al., Token Mixing, AAAI 2023.
    """

    name = "token_mixing"
    takes = ("layers", "mixing")
    settings = (
        Setting(
            "token_mixing (P)",
            Tuning("token_mixing"),
            7.1,
            7.07,
            "7.078 in full: the paper rounds it to 7.1 and truncates it to 7.07",
        ),
        Setting("token_mixing, attention only", Tuning("token_mixing", ffn=False), 2.4),
        Setting("token_mixing, FFN only", Tuning("token_mixing", attention=False), 4.7),
        Setting("token_mixing (F)", Tuning("token_mixing", everything=True)),
    )

    def insert(self, encoder: VideoEncoder, tuning: Tuning, layers: tuple[int, ...]) -> None:
        if layers:
            mix_tokens(encoder.vision_model, encoder.num_frames, tuning.mixing, layers)

    def mixing_layers(self, tuning: Tuning, depth: int) -> tuple[int, ...]:
        return self.layers(tuning, depth)


METHOD = TokenMixingTuning()
