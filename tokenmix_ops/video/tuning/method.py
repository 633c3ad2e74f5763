"""What a tuning method is: what it inserts into a video model, and what it updates there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

from torch import nn

from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.layer import VideoLayer

MethodName = Literal[
    "token_mixing",
    "spatial",
    "full",
    "temporal",
    "dual_attention",
    "st_adapter",
    "adapter",
    "bitfit",
    "lora",
    "frozen",
]


@dataclass(frozen=True)
class Tuning:
    """How a pre-trained model is tuned. What is left at None follows the method."""

    method: MethodName = "token_mixing"
    """What the paper compares; "lora" and "frozen" are ours."""
    everything: bool | None = None
    """Update the whole model, text side included: the paper's (F), and the default of "full"."""
    layers: tuple[int, ...] | None = None
    """Layers that the method changes, from 0 or from the end; None: the last for token_mixing and
    spatial, the new blocks for temporal and full, else all."""
    mixing: str = "released"
    """Which tokens token_mixing attends to: released, paper, joint, ..."""
    linear_projection: bool | None = None
    """Update the patch embedding, [CLS] and the position embeddings (Table 4, LP)."""
    language_head: bool | None = None
    """Update the heads on top of the text and video features (Table 4, LH)."""
    attention: bool | None = None
    """Update the method's part at the attention of its layers (Table 4)."""
    ffn: bool | None = None
    """Update the method's part at the FFN of its layers (Table 4)."""
    bottleneck: int | None = None
    """Width inside an adapter; None: an eighth of the model's, of an ST-Adapter half of it."""
    rank: int = 8
    """Rank of a LoRA update."""
    num_blocks: int = 4
    """Temporal blocks on top, of temporal and full."""
    temporal_position: bool = False
    """A learnt position of each frame below the first temporal attention; not in the paper."""


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
    source: ClassVar[str]
    """Where it comes from, for help texts."""

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


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """All parameters of some modules."""
    return [parameter for module in modules for parameter in module.parameters()]
