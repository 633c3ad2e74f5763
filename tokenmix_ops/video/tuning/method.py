"""What a tuning method defines: what it inserts into a video model, and what it updates there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.layer import VideoLayer
from tokenmix_ops.video.tuning.spec import Tuning


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


class Setting(NamedTuple):
    """A setting of a method that gets a row in `tokenmix params`.

    ``captioning`` and ``retrieval`` are the millions of parameters that the paper prints for
    ViT-B/16, in Table 1 (in Table 4 for parts of a layer) and in Table 2; None where it prints
    none.
    """

    name: str
    tuning: Tuning
    captioning: float | None = None
    retrieval: float | None = None
    note: str = ""


class TuningMethod(ABC):
    """One way of tuning. The file of this folder that a method is named after holds it whole.

    Attributes:
        name: as ``--method`` takes it.
        takes: the settings of a `Tuning` that the method reads, besides its switches.
        switches: which parts it updates unless told otherwise.
        last_layer_only: whether ``layers`` defaults to the last layer, in place of all.
        updates_final_norm: whether it updates the norm on top of the tower too.
        settings: rows of `tokenmix params`.
    """

    name: ClassVar[str]
    takes: ClassVar[tuple[str, ...]] = ()
    switches: ClassVar[Switches] = Switches()
    last_layer_only: ClassVar[bool] = False
    updates_final_norm: ClassVar[bool] = True
    settings: ClassVar[tuple[Setting, ...]]

    def insert(self, encoder: VideoEncoder, tuning: Tuning, layers: tuple[int, ...]) -> None:
        """Puts new modules into the encoder, or changes its attention; nothing by default."""
        return None

    @abstractmethod
    def updated(
        self, model: VideoModel, layers: tuple[int, ...], switches: Switches
    ) -> Iterable[nn.Parameter]:
        """The method's own parameters to update, besides LP, LH and the final norm."""

    def layers(self, tuning: Tuning, depth: int) -> tuple[int, ...]:
        """The layers that a tower of ``depth`` layers is changed in; ValueError for others."""
        if tuning.layers is None:
            return (depth - 1,) if self.last_layer_only else tuple(range(depth))
        for layer in tuning.layers:
            if not -depth <= layer < depth:
                raise ValueError(f"layer {layer} does not exist: the tower has {depth} layers")
        return tuple(sorted({layer % depth for layer in tuning.layers}))

    def mixing_layers(self, tuning: Tuning, depth: int) -> tuple[int, ...]:
        """Those of them in which ``tuning.mixing`` mixes tokens; none by default."""
        return ()

    def plain_weights(self, encoder: VideoEncoder) -> dict[str, Tensor]:
        """The tower's weights by the names that transformers gives them, to export."""
        return dict(encoder.vision_model.state_dict())

    def counts(self, name: str, parameter: Tensor, switches: Switches) -> bool:
        """Whether the paper's figures count an updated parameter: those of weight matrices in the
        tower's layers, by default."""
        return parameter.dim() > 1 and name.startswith("encoder.vision_model.encoder.layers.")


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
