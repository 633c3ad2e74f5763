"""Swaps the attention layers of image ViTs for token mixing, in place and reversibly.

A family of models is declared by a small `VisionFamily`: where its vision tower and attention
layers are, and what their parts are called. Models are recognised by class name, so that no model
library is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from tokenmix_ops.mixing import Mixing
from tokenmix_ops.modules import (
    PackedParameters,
    PackedProjection,
    Projection,
    SeparateProjections,
    TokenMixing,
    set_num_frames,
)

__all__ = [
    "ConvertedAttention",
    "VisionFamily",
    "mix_tokens",
    "register_family",
    "set_num_frames",
    "unmix_tokens",
]


@dataclass(frozen=True)
class VisionFamily:
    """Where a family of image ViTs keeps its attention, and what its parts are called.

    Attributes:
        name: shown in errors.
        towers: dotted class names of its vision towers; text towers next to them stay untouched.
        attention: dotted class name of its attention layer.
        projection: how a layer makes query, key and value.
        output: children applied to the merged heads, in order.
        num_heads, scale: attributes of a layer; ``scale`` None means head_dim ** -0.5.
        attention_dropout: attribute of a layer holding a probability or an nn.Dropout.
        query_norm, key_norm: children that normalise each head, if any.
        num_prefix_tokens: leading tokens that are not patches, or a function of the tower.
        returns_tuple: whether a layer returns ``(output, weights)`` or the output alone.
        block: dotted class name of an attention layer's parent, where its own class is not enough.
        refuses: attributes of a layer that must be None or absent, for what is not computed here.
    """

    name: str
    towers: tuple[str, ...]
    attention: str
    projection: Projection
    output: tuple[str, ...]
    num_heads: str = "num_heads"
    scale: str | None = "scale"
    attention_dropout: str = "dropout"
    query_norm: str | None = None
    key_norm: str | None = None
    num_prefix_tokens: int | Callable[[nn.Module], int] = 1
    returns_tuple: bool = True
    block: str | None = None
    refuses: tuple[str, ...] = ()


_HF = "transformers.models"
_VIT = VisionFamily(
    "transformers ViT",
    (f"{_HF}.vit.modeling_vit.ViTModel",),
    f"{_HF}.vit.modeling_vit.ViTAttention",
    SeparateProjections(),
    ("o_proj",),
    num_heads="num_attention_heads",
    scale="scaling",
    attention_dropout="attention_dropout",
)


def _registers(tower: nn.Module) -> int:
    return 1 + int(tower.config.num_register_tokens)  # type: ignore[union-attr, arg-type]


def _of_tower(tower: nn.Module) -> int:
    return int(tower.num_prefix_tokens)  # type: ignore[arg-type]


def _dinov2(
    name: str, module: str, prefix: str, num_prefix_tokens: int | Callable[[nn.Module], int]
) -> list[VisionFamily]:
    path = f"{_HF}.{module}.modeling_{module}.{prefix}"
    current = replace(
        _VIT,
        name=f"transformers {name}",
        towers=(f"{path}Model", f"{path}Backbone"),
        attention=f"{path}Attention",
        num_prefix_tokens=num_prefix_tokens,
    )
    # Up to transformers 5.17 an inner layer attends and its parent projects the output.
    earlier = replace(
        current,
        name=f"{current.name}, earlier",
        attention=f"{path}SelfAttention",
        projection=SeparateProjections("query", "key", "value"),
        output=(),
        attention_dropout="dropout_prob",
    )
    return [current, earlier]


FAMILIES: list[VisionFamily] = [
    VisionFamily(
        "transformers BLIP",
        (f"{_HF}.blip.modeling_blip.BlipVisionModel",),
        f"{_HF}.blip.modeling_blip.BlipAttention",
        PackedProjection("qkv"),
        ("projection",),
    ),
    VisionFamily(
        "transformers BLIP-2",
        (f"{_HF}.blip_2.modeling_blip_2.Blip2VisionModel",),
        f"{_HF}.blip_2.modeling_blip_2.Blip2Attention",
        PackedProjection("qkv"),
        ("projection",),
        attention_dropout="attention_dropout",
    ),
    VisionFamily(
        "transformers CLIP",
        (
            f"{_HF}.clip.modeling_clip.CLIPVisionModel",
            f"{_HF}.clip.modeling_clip.CLIPVisionTransformer",
        ),
        f"{_HF}.clip.modeling_clip.CLIPAttention",
        SeparateProjections(),
        ("out_proj",),
    ),
    VisionFamily(
        "transformers SigLIP",
        (
            f"{_HF}.siglip.modeling_siglip.SiglipVisionModel",
            f"{_HF}.siglip.modeling_siglip.SiglipVisionTransformer",
        ),
        f"{_HF}.siglip.modeling_siglip.SiglipAttention",
        SeparateProjections(),
        ("out_proj",),
        num_prefix_tokens=0,
    ),
    _VIT,
    *_dinov2("DINOv2", "dinov2", "Dinov2", 1),
    *_dinov2("DINOv2 with registers", "dinov2_with_registers", "Dinov2WithRegisters", _registers),
    VisionFamily(
        "timm",
        ("timm.models.vision_transformer.VisionTransformer",),
        "timm.layers.attention.Attention",
        PackedProjection("qkv"),
        ("norm", "proj", "proj_drop"),
        attention_dropout="attn_drop",
        query_norm="q_norm",
        key_norm="k_norm",
        num_prefix_tokens=_of_tower,
        returns_tuple=False,
        refuses=("gate",),
    ),
    VisionFamily(
        "open_clip",
        ("open_clip.transformer.VisionTransformer",),
        "torch.nn.modules.activation.MultiheadAttention",
        PackedParameters("in_proj_weight", "in_proj_bias"),
        ("out_proj",),
        scale=None,
        block="open_clip.transformer.ResidualAttentionBlock",
        refuses=("bias_k", "bias_v"),
    ),
]
"""The families that can be converted; `register_family` adds to them."""


class ConvertedAttention(TokenMixing):
    """An attention layer of an image ViT that mixes tokens, on the layer's own parameters.

    It holds the children, parameters and buffers of the original under the same names, so that
    state dicts stay the same, and the original itself for `unmix_tokens`. The frames of a video
    must follow each other in the batch.
    """

    def __init__(
        self,
        original: nn.Module,
        family: VisionFamily,
        *,
        num_frames: int,
        mixing: Mixing | str,
        num_prefix_tokens: int,
        backend: str | None,
    ) -> None:
        super().__init__(
            num_heads=getattr(original, family.num_heads),
            num_frames=num_frames,
            mixing=mixing,
            num_prefix_tokens=num_prefix_tokens,
            projection=family.projection,
            scale=None if family.scale is None else float(getattr(original, family.scale)),
            backend=backend,
        )
        self.family = family
        for name, child in original.named_children():
            self.add_module(name, child)
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in original.named_buffers(recurse=False):
            kept = name not in original._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=kept)
        self.training = original.training
        # Not through setattr, which would register the original as a child.
        self.__dict__["original"] = original

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[batch * num_frames, num_tokens, dim] in and out, as the original layer returns it."""
        masks = {name: kwargs.get(name) for name in ("attention_mask", "attn_mask", "is_causal")}
        given = [name for name, value in masks.items() if value is not None and value is not False]
        given += [
            "a second tensor" for other in args if other is not None and other is not hidden_states
        ]
        if given:
            raise ValueError(
                f"token mixing takes no attention mask and no other keys, got {', '.join(given)}"
            )
        output, _ = self.attend(hidden_states)
        output = output.flatten(0, 1) if hidden_states.dim() == 3 else output
        for name in self.family.output:
            output = self.get_submodule(name)(output)
        return (output, None) if self.family.returns_tuple else output

    def normalize_query_key(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if self.family.query_norm is not None:
            query = self.get_submodule(self.family.query_norm)(query)
        if self.family.key_norm is not None:
            key = self.get_submodule(self.family.key_norm)(key)
        return query, key

    def restored(self) -> nn.Module:
        """The original layer, with what became of its parts since."""
        original: nn.Module = self.__dict__["original"]
        for name in original._modules:
            original._modules[name] = self._modules[name]
        for name in original._parameters:
            original._parameters[name] = self._parameters.get(name)
        for name in original._buffers:
            original._buffers[name] = self._buffers.get(name)
        # Not train(), which would also set the children's.
        original.training = self.training
        return original


def mix_tokens(
    model: nn.Module,
    num_frames: int = 8,
    mixing: Mixing | str = "released",
    layers: Iterable[int] | Literal["all"] = (-1,),
    *,
    backend: str | None = None,
) -> nn.Module:
    """Makes attention layers of an image ViT mix the tokens of a video's frames; in place.

    The model then takes frames as its batch: [batch * num_frames, ...], the frames of a video in a
    row. Parameters and state-dict keys stay as they are, and `unmix_tokens` undoes it. A layer that
    mixes already is changed to the new mixing.

    Args:
        model: a supported model or its vision tower (transformers BLIP, BLIP-2, CLIP, SigLIP, ViT,
            DINOv2; timm; open_clip).
        num_frames: frames of a video.
        mixing: a `Mixing` or a name; ``"spatial"`` computes what the model did, by faster means
            where its own attention was not fused.
        layers: which attention layers, counted from 0 or from the end, or "all".
        backend: a backend's name, or None for the usual choice.

    Returns the model. Raises ValueError for an unsupported model (`register_family` adds to them),
    a layer that does not exist, or attention dropout, which token mixing does not have.
    """
    towers = [
        (name, module, family)
        for name, module in model.named_modules()
        if (family := _family(module)) is not None
    ]
    # A tower may be wrapped in another class that counts as one.
    towers = [t for t in towers if not any(_inside(t[0], other[0]) for other in towers)]
    if len(towers) != 1:
        problem = (
            f"{type(model).__name__} has {len(towers)} vision towers; pass one of them"
            if towers
            else f"{type(model).__name__} has no supported vision tower"
        )
        supported = "; ".join(f"{f.name} ({f.towers[0].rsplit('.', 1)[1]})" for f in FAMILIES)
        raise ValueError(
            f"{problem}. Supported: {supported}. "
            "Declare others with tokenmix_ops.register_family(VisionFamily(...))"
        )
    _, tower, family = towers[0]
    places = _attention_layers(tower, family)
    chosen = _chosen(layers, len(places))
    prefix = family.num_prefix_tokens
    num_prefix_tokens = prefix if isinstance(prefix, int) else prefix(tower)
    converted = {}
    for index in chosen:
        original = places[index][2]
        if isinstance(original, ConvertedAttention):
            original = original.restored()
        _refuse(original, family)
        converted[index] = ConvertedAttention(
            original,
            family,
            num_frames=num_frames,
            mixing=mixing,
            num_prefix_tokens=num_prefix_tokens,
            backend=backend,
        )
    # Only now, so that an error above leaves the model as it was.
    for index, layer in converted.items():
        parent, name, _ = places[index]
        setattr(parent, name, layer)
    return model


def unmix_tokens(model: nn.Module) -> nn.Module:
    """Puts the original attention layers back, with their present parameters; returns the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ConvertedAttention):
                setattr(parent, name, child.restored())
    return model


def register_family(family: VisionFamily) -> None:
    """Lets `mix_tokens` convert models of another family; replaces one of the same name."""
    FAMILIES[:] = [other for other in FAMILIES if other.name != family.name] + [family]


def _family(module: nn.Module) -> VisionFamily | None:
    # Later registrations come first, so that a user's family can refine a shipped one.
    return next(
        (
            f
            for f in reversed(FAMILIES)
            if _is_a(module, *f.towers) and _attention_layers(module, f)
        ),
        None,
    )


def _is_a(module: nn.Module, *class_names: str) -> bool:
    return any(f"{c.__module__}.{c.__qualname__}" in class_names for c in type(module).__mro__)


def _inside(name: str, other: str) -> bool:
    return name != other and (other == "" or name.startswith(other + "."))


def _attention_layers(
    tower: nn.Module, family: VisionFamily
) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name in it, layer) of each attention layer of a tower, in order."""
    return [
        (parent, name, child)
        for parent in tower.modules()
        for name, child in parent.named_children()
        if (child.family == family if isinstance(child, ConvertedAttention) else False)
        or (_is_a(child, family.attention) and (not family.block or _is_a(parent, family.block)))
    ]


def _chosen(layers: Iterable[int] | Literal["all"], count: int) -> Sequence[int]:
    if layers == "all":
        return range(count)
    if isinstance(layers, str | int):
        raise ValueError(f"layers must be a sequence of layer numbers or 'all', got {layers!r}")
    chosen = list(layers)
    for layer in chosen:
        if not -count <= layer < count:
            raise ValueError(f"layer {layer} does not exist: the tower has {count} layers")
    if not chosen:
        raise ValueError("layers must name at least one layer, got none")
    return sorted({layer % count for layer in chosen})


def _refuse(layer: nn.Module, family: VisionFamily) -> None:
    dropout = getattr(layer, family.attention_dropout, 0.0)
    probability = dropout.p if isinstance(dropout, nn.Dropout) else dropout
    if probability:
        raise ValueError(
            f"token mixing has no attention dropout, but {type(layer).__name__} has "
            f"{family.attention_dropout} = {probability}; build the model with 0"
        )
    for name in family.refuses:
        if getattr(layer, name, None) is not None:
            raise ValueError(f"{type(layer).__name__} with {name!r} is not supported")
    if getattr(layer, "batch_first", None) is False:
        raise ValueError(f"{type(layer).__name__} with 'batch_first' = False is not supported")
