"""All methods by name, and `apply`, which inserts, freezes and tells."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import NamedTuple

from torch import nn

from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.tuning.adapter import AdapterTuning
from tokenmix_ops.video.tuning.bitfit import BitFit
from tokenmix_ops.video.tuning.dual_attention import DualAttentionTuning
from tokenmix_ops.video.tuning.frozen import Frozen
from tokenmix_ops.video.tuning.full import Full
from tokenmix_ops.video.tuning.lora import Lora
from tokenmix_ops.video.tuning.method import Switches, TuningMethod, VideoModel
from tokenmix_ops.video.tuning.settings import Tuning
from tokenmix_ops.video.tuning.spatial import Spatial
from tokenmix_ops.video.tuning.st_adapter import STAdapterTuning
from tokenmix_ops.video.tuning.temporal import Temporal
from tokenmix_ops.video.tuning.token_mixing import TokenMixing

METHODS: dict[str, TuningMethod] = {
    method.name: method
    for method in (
        TokenMixing(),
        Spatial(),
        Full(),
        Temporal(),
        DualAttentionTuning(),
        STAdapterTuning(),
        AdapterTuning(),
        BitFit(),
        Lora(),
        Frozen(),
    )
}
"""Every method, by name."""


class Tuned(NamedTuple):
    """What `apply` did, in names of the model's modules and parameters.

    ``inserted``: modules that the image model does not have; ``updated``: parameters that require
    a gradient now, all others being frozen.
    """

    inserted: tuple[str, ...]
    updated: tuple[str, ...]


def apply(model: VideoModel, tuning: Tuning) -> Tuned:
    """Makes a video model ready to be tuned, in place.

    The model must be fresh from its image weights, its encoder without mixing. Raises ValueError
    for an unknown method, a setting that it does not read, layers that do not exist, or a model
    that mixes or to which a method was applied. Inserted modules follow the tower's device and
    type.
    """
    if tuning.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {tuning.method!r}")
    if model.tuning is not None:
        raise ValueError(f"the model is tuned by {model.tuning.method} already; load it anew")
    for index, layer in enumerate(model.encoder.layers):
        if layer.self_attn.mixing.kind != "spatial":
            raise ValueError(f"layer {index} mixes tokens already: load the image model anew")
    method = METHODS[tuning.method]
    for setting in fields(tuning):
        if setting.name not in ("method", *Switches._fields, *method.takes):
            value = getattr(tuning, setting.name)
            if value != setting.default:
                raise ValueError(
                    f"method {method.name!r} has no use for {setting.name} = {value!r}: "
                    "leave it out"
                )
    if switches_of(tuning).everything:
        for name in ("linear_projection", "language_head"):
            if getattr(tuning, name) is False:
                raise ValueError(f"everything is updated, {name} too: leave one of the two out")
    layers = _layers(model.encoder, method, tuning)
    before = set(model.parameters()), set(model.encoder.modules())
    method.insert(model.encoder, tuning, layers)
    inserted = _inserted(model.encoder, *before)
    like = model.encoder.vision_model.embeddings.class_embedding
    for name in inserted:
        model.encoder.get_submodule(name.removeprefix("encoder.")).to(like.device, like.dtype)
    model.tuning = tuning
    chosen = _chosen(model, method, layers, switches_of(tuning))
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    updated = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    return Tuned(inserted, updated)


def switches_of(tuning: Tuning) -> Switches:
    """The parts that are updated, what was left open filled in by the method."""
    given = {name: getattr(tuning, name) for name in Switches._fields}
    return METHODS[tuning.method].switches._replace(
        **{name: value for name, value in given.items() if value is not None}
    )


def resolved(tuning: Tuning) -> Tuning:
    """The same with every switch filled in, as it is kept with a checkpoint."""
    return replace(tuning, **switches_of(tuning)._asdict())


def _chosen(
    model: VideoModel, method: TuningMethod, layers: tuple[int, ...], switches: Switches
) -> list[nn.Parameter]:
    if switches.everything:
        return list(model.parameters())
    tower = model.encoder.vision_model
    chosen = list(method.updated(model, layers, switches))
    if switches.linear_projection:
        chosen += tower.embeddings.parameters()
    if switches.language_head:
        chosen += model.heads()
    if switches.linear_projection or switches.language_head or switches.attention or switches.ffn:
        chosen += [] if method.name == "bitfit" else tower.post_layernorm.parameters()
    return chosen


def _layers(encoder: VideoEncoder, method: TuningMethod, tuning: Tuning) -> tuple[int, ...]:
    depth = len(encoder.layers)
    if tuning.layers is None:
        return (depth - 1,) if method.last_layer_only else tuple(range(depth))
    for layer in tuning.layers:
        if not -depth <= layer < depth:
            raise ValueError(f"layer {layer} does not exist: the tower has {depth} layers")
    return tuple(sorted({layer % depth for layer in tuning.layers}))


def _inserted(
    encoder: VideoEncoder, parameters: set[nn.Parameter], modules: set[nn.Module]
) -> tuple[str, ...]:
    """The outermost modules, not among ``modules``, with parameters not among ``parameters``."""
    new = {
        f"encoder.{name}"
        for name, module in encoder.named_modules()
        if module not in modules and any(p not in parameters for p in module.parameters())
    }
    return tuple(sorted(name for name in new if name.rsplit(".", 1)[0] not in new))
