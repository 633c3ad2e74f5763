"""All methods by name, and `apply`, which inserts modules, freezes the rest and reports both."""

from __future__ import annotations

from dataclasses import fields, replace
from importlib import import_module
from typing import NamedTuple, get_args

from torch import nn

from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.tuning.method import Switches, TuningMethod, VideoModel
from tokenmix_ops.video.tuning.spec import MethodName, Tuning

METHODS: dict[str, TuningMethod] = {
    name: import_module(f"tokenmix_ops.video.tuning.{name}").METHOD for name in get_args(MethodName)
}
"""Every method by name, each from the file of its name."""


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
        raise ValueError(f"the model was tuned by {model.tuning.method} already: load it again")
    for index, layer in enumerate(model.encoder.layers):
        if layer.self_attn.mixing.kind != "spatial":
            raise ValueError(f"layer {index} mixes tokens already: load the image model again")
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
    layers = method.layers(tuning, len(model.encoder.layers))
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
    if method.updates_final_norm and any(switches):
        chosen += tower.post_layernorm.parameters()
    return chosen


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
