"""Declarations of the image ViT families that can be converted.

Models are recognised by class name, so this file imports no model library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from tokenmix_ops.projections import (
    PackedParameters,
    PackedProjection,
    Projection,
    SeparateProjections,
)


@dataclass(frozen=True)
class VisionFamily:
    """Where the models of a family keep their attention layers, and the names of their parts.

    Attributes:
        name: name to show in errors.
        towers: dotted class names (module and class) of the vision towers. Text towers are left
            alone.
        attention: dotted class name of the attention layer.
        projection: how a layer computes query, key and value: ``PackedProjection("qkv")`` for one
            child for all three, ``SeparateProjections("q", "k", "v")`` for three children,
            ``PackedParameters("in_proj_weight", "in_proj_bias")`` for parameters of the layer.
        output: children applied to the merged heads, in order.
        num_heads, scale: attributes of a layer; ``scale`` None means head_dim ** -0.5.
        attention_dropout: attribute of a layer holding a probability or an nn.Dropout, if any.
        query_norm, key_norm: children that normalise each head, if any.
        num_prefix_tokens: leading tokens that are not patches, or a function of the tower.
        returns_tuple: whether a layer returns ``(output, weights)`` or the output alone.
        block: dotted class name of an attention layer's parent, where its own class is not enough.
        refuses: attributes of a layer that must be None, False or absent; not computed here.
    """

    name: str
    towers: tuple[str, ...]
    attention: str
    projection: Projection
    output: tuple[str, ...]
    num_heads: str = "num_heads"
    scale: str | None = "scale"
    attention_dropout: str | None = "dropout"
    query_norm: str | None = None
    key_norm: str | None = None
    num_prefix_tokens: int | Callable[[nn.Module], int] = 1
    returns_tuple: bool = True
    block: str | None = None
    refuses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("towers", "output", "refuses"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name} must be a tuple of names, got {getattr(self, name)!r}")
        for path in (*self.towers, self.attention):
            if "." not in path:
                raise ValueError(f"{path!r} must be a dotted class name: module.Class")
        if not callable(self.projection):
            raise ValueError(
                "projection must be a PackedProjection, SeparateProjections or PackedParameters, "
                f"got {self.projection!r}"
            )


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
        refuses=("bias_k", "bias_v", "q_proj_weight", "add_zero_attn"),
    ),
]
"""The families that can be converted; `register_family` adds to them."""


def register_family(family: VisionFamily) -> None:
    """Lets `mix_tokens` convert models of another family; replaces a family of the same name."""
    FAMILIES[:] = [other for other in FAMILIES if other.name != family.name] + [family]
