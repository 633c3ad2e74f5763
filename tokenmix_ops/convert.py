"""Swaps the attention layers of image ViTs for token mixing, in place and reversibly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from tokenmix_ops.arguments import refuse_others
from tokenmix_ops.families import FAMILIES, VisionFamily
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.modules import Queries, TokenMixing, check_frames
from tokenmix_ops.torch_internals import follow, parts


class ConvertedAttention(TokenMixing):
    """Replaces an attention layer of an image ViT, using the layer's own parameters.

    Holds the children, parameters and buffers of the original under the same names, so state dicts
    do not change, and the original itself for `unmix_tokens`. The frames of a video must be
    consecutive in the batch.
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
        # Includes None and shared entries. Hooks on the original layer keep firing.
        for own, given in zip(parts(self), parts(original), strict=True):
            clash = [name for name in given if name in vars(self)]
            if clash:
                raise ValueError(f"{type(original).__name__}: the name {clash[0]!r} is taken here")
            own.update(given)
        follow(self, original)
        self.training = original.training
        # Not through setattr, which would register the original as a child.
        self.__dict__["original"] = original

    def forward(
        self, hidden_states: Tensor, *args: Any, queries: Queries | None = None, **kwargs: Any
    ) -> Any:
        """Attends over [batch * num_frames, num_tokens, dim]; returns what the original layer does.

        ``queries="prefix"`` computes only the rows of the prefix tokens. Raises ValueError for
        other arguments that could change the result (`refuse_others`).
        """
        refuse_others("token mixing", hidden_states, args, kwargs)
        output, _ = self.attend(hidden_states, queries=queries)
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
        """Returns the original layer with its current children, parameters and buffers.

        Raises ValueError if one of them has been removed, as when LoRA splits a projection.
        """
        original: nn.Module = self.__dict__["original"]
        for now, before in zip(parts(self), parts(original), strict=True):
            for name in before:
                if name not in now:
                    raise ValueError(
                        f"{type(original).__name__} cannot be restored: its {name!r} was replaced "
                        "after the conversion; reload the model"
                    )
                before[name] = now[name]
        follow(original, self)
        # Not train(), which would also change the children.
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
    """Makes attention layers of an image ViT mix the tokens of a video's frames, in place.

    The model then takes frames as its batch: [batch * num_frames, ...], with the frames of a video
    consecutive. Parameters and state-dict keys do not change, and `unmix_tokens` reverts the
    conversion. A layer that already mixes switches to the new mixing.

    Args:
        model: a supported model or its vision tower (transformers BLIP, BLIP-2, CLIP, SigLIP, ViT,
            DINOv2; timm; open_clip).
        num_frames: frames of a video.
        mixing: a `Mixing` or its name. ``"spatial"`` computes the same result as the original
            model, faster where its own attention is not fused.
        layers: indices of the attention layers to convert, negative from the end, or "all".
        backend: name of a backend, or None for the automatic choice.

    Returns the model. Raises ValueError for an unsupported model (`register_family` adds to them),
    a layer that does not exist, or attention dropout, which token mixing does not have.
    """
    towers = [
        (name, module, family)
        for name, module in model.named_modules()
        if (family := _family(module)) is not None
    ]
    # A tower may be wrapped in another class that is itself declared as a tower.
    towers = [t for t in towers if not any(_inside(t[0], other[0]) for other in towers)]
    if len(towers) != 1:
        problem = (
            f"{type(model).__name__} has {len(towers)} vision towers; pass one of them"
            if towers
            else f"{type(model).__name__} has no supported vision tower"
        )
        bare = [(m, f) for m in model.modules() for f in FAMILIES if _is_a(m, *f.towers)]
        if not towers and bare:
            module, family = bare[-1]
            problem += f": {type(module).__name__} holds no {family.attention}"
        # List a model once, even if its versions have a declaration each.
        names = {f.towers: f"{f.name} ({f.towers[0].rsplit('.', 1)[1]})" for f in FAMILIES[::-1]}
        supported = "; ".join(list(names.values())[::-1])
        raise ValueError(
            f"{problem}. Supported: {supported}. "
            "Declare others with tokenmix_ops.register_family(VisionFamily(...))"
        )
    check_frames(num_frames)
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
    # Replaced last, so that an error above leaves the model unchanged.
    for index, layer in converted.items():
        parent, name, _ = places[index]
        setattr(parent, name, layer)
    return model


def unmix_tokens(model: nn.Module) -> nn.Module:
    """Restores the original attention layers with their current parameters; returns the model.

    Raises ValueError, and leaves the model unchanged, if a part of a layer was replaced.
    """
    restored = [
        (parent, name, child.restored())
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, ConvertedAttention)
    ]
    for parent, name, original in restored:
        setattr(parent, name, original)
    return model


def _family(module: nn.Module) -> VisionFamily | None:
    # Later registrations take precedence, so a user's family can refine a shipped one.
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
    """Returns (parent, name in the parent, layer) of each attention layer of a tower, in order."""
    return [
        (parent, name, child)
        for parent in tower.modules()
        for name, child in parent.named_children()
        if (isinstance(child, ConvertedAttention) and child.family.name == family.name)
        or (_is_a(child, family.attention) and (not family.block or _is_a(parent, family.block)))
    ]


def _chosen(layers: Iterable[int] | Literal["all"], count: int) -> Sequence[int]:
    if layers == "all":
        return range(count)
    if isinstance(layers, str | int):
        raise ValueError(f"layers must be a sequence of layer numbers or 'all', got {layers!r}")
    chosen = list(layers)
    for layer in chosen:
        if type(layer) is not int:
            raise ValueError(f"layers must be whole numbers, got {layer!r}")
        if not -count <= layer < count:
            raise ValueError(f"layer {layer} does not exist: the tower has {count} layers")
    if not chosen:
        raise ValueError("layers must name at least one layer, got none")
    return sorted({layer % count for layer in chosen})


def _refuse(layer: nn.Module, family: VisionFamily) -> None:
    """Raises ValueError for a layer that does not match its declaration or is not supported."""
    kind = type(layer).__name__
    names = [family.num_heads, family.scale, family.query_norm, family.key_norm, *family.output]
    names += family.projection.parts
    missing = [name for name in names if name is not None and not hasattr(layer, name)]
    if missing:
        raise ValueError(f"family {family.name!r} declares {missing[0]!r}, which {kind} lacks")
    dropout = getattr(layer, family.attention_dropout or "", 0.0)
    probability = dropout.p if isinstance(dropout, nn.Dropout) else dropout
    if probability:
        raise ValueError(
            f"token mixing has no attention dropout, but {kind} has "
            f"{family.attention_dropout} = {probability}; build the model with 0"
        )
    for name in family.refuses:
        value = getattr(layer, name, None)
        if value is not None and value is not False:
            raise ValueError(f"{kind} with {name!r} is not supported")
    if getattr(layer, "batch_first", None) is False:
        raise ValueError(f"{kind} with 'batch_first' = False is not supported")
