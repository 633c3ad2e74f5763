"""What a tuning method is: what it inserts into a video model, and what it updates there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple, Protocol

from torch import nn

from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.layer import VideoLayer
from tokenmix_ops.video.tuning.settings import Tuning


class VideoModel(Protocol):
    """A task's model as tuning sees it: a video encoder, text modules, and heads."""

    tuning: Tuning | None
    """What `apply` applied."""

    @property
    def encoder(self) -> VideoEncoder: ...

    def heads(self) -> list[nn.Parameter]:
        """The language head or projection heads: what Table 4 calls LH."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module: ...


class Switches(NamedTuple):
    """Which parts are updated, where a `Tuning` leaves it to the method."""

    linear_projection: bool = True
    language_head: bool = True
    attention: bool = True
    ffn: bool = True
    everything: bool = False


class TuningMethod(ABC):
    """One way of tuning; each subclass is a file of this folder."""

    name: ClassVar[str]
    switches: ClassVar[Switches] = Switches()
    last_layer_only: ClassVar[bool] = False
    takes: ClassVar[tuple[str, ...]] = ()
    """The settings of a `Tuning`, besides its switches, that the method reads."""

    def insert(self, encoder: VideoEncoder, tuning: Tuning, layers: tuple[int, ...]) -> None:
        """Puts new modules into the encoder, or changes its attention; nothing by default."""
        return None

    @abstractmethod
    def updated(
        self, model: VideoModel, layers: tuple[int, ...], switches: Switches
    ) -> Iterable[nn.Parameter]:
        """The method's own parameters to update, besides LP, LH and the final norm."""


def layer_parts(layer: VideoLayer, switches: Switches) -> list[nn.Module]:
    """The attention and the FFN of a layer, each with its norm, as far as switched on."""
    parts: list[nn.Module] = []
    if switches.attention:
        parts += [layer.layer_norm1, layer.self_attn]
    if switches.ffn:
        parts += [layer.layer_norm2, layer.mlp]
    return parts


def bottleneck_of(tuning: Tuning, default: int) -> int:
    """The width inside an adapter; ValueError if it is less than 1."""
    if tuning.bottleneck is None:
        return max(1, default)
    if tuning.bottleneck < 1:
        raise ValueError(f"bottleneck must be at least 1, got {tuning.bottleneck}")
    return tuning.bottleneck


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """All parameters of some modules."""
    return [parameter for module in modules for parameter in module.parameters()]
