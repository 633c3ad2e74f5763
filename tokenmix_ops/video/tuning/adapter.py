"""Adapters: small bottlenecks before the attention and before the FFN of each layer."""

from __future__ import annotations

from collections.abc import Iterable

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


class Adapter(nn.Module):
    """dim → bottleneck → sigmoid → bottleneck → dim, added to its input; at first the identity.

    The weights are 2 · dim · bottleneck + bottleneck² as the paper counts them: 156,672 at 768.
    """

    def __init__(self, dim: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, bottleneck)
        self.activation = nn.Sigmoid()
        self.middle = nn.Linear(bottleneck, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., dim] in and out."""
        inner = self.middle(self.activation(self.down(hidden_states)))
        return hidden_states + self.up(inner)


class AdapterTuning(TuningMethod):
    """Updates the adapters: two a layer, one with a switch off (the paper's 1.88 M count one).

    Source: Houlsby et al., ICML 2019.
    """

    name = "adapter"
    takes = ("layers", "bottleneck")
    settings = (
        Setting(
            "adapter, one a layer",
            Tuning("adapter", ffn=False),
            1.9,
            1.88,
            "what the paper counts",
        ),
        Setting(
            "adapter, two a layer",
            Tuning("adapter"),
            1.9,
            1.88,
            "what the published code inserts; the paper counts one",
        ),
    )

    def insert(self, encoder: VideoEncoder, tuning: Tuning, layers: tuple[int, ...]) -> None:
        dim = encoder.config.hidden_size
        bottleneck = bottleneck_of(tuning, dim // 8)
        for index in layers:
            layer = encoder.layers[index]
            if tuning.attention is not False:
                layer.before_attention = Adapter(dim, bottleneck)
            if tuning.ffn is not False:
                layer.before_ffn = Adapter(dim, bottleneck)

    def updated(
        self, model: VideoModel, layers: tuple[int, ...], switches: Switches
    ) -> Iterable[nn.Parameter]:
        return parameters_of(m for m in model.encoder.modules() if isinstance(m, Adapter))


METHOD = AdapterTuning()
