"""A BLIP ViT over the frames of a video, with token mixing in chosen layers."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip import BlipEncoderLayer

from tokenmix_ops.convert import mix_tokens
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.modules import Queries, TokenMixing, set_num_frames
from tokenmix_ops.video.layer import VideoLayer

Layers = Iterable[int] | Literal["all"]

ARCHITECTURES = {
    "vit-b16": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "vit-l16": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
}
"""The backbones of the paper: BLIP ViT-B/16 and ViT-L/16."""


WITH_TOWER = {
    "BlipForConditionalGeneration",
    "BlipForImageTextRetrieval",
    "BlipForQuestionAnswering",
    "BlipModel",
    "BlipVisionModel",
}
"""The models of transformers that hold BLIP's vision tower."""


class VideoEncoding(NamedTuple):
    """What a `VideoEncoder` returns.

    ``tokens`` [batch, num_frames, num_tokens, dim], after the final norm; ``pooled`` [batch, dim],
    the mean of the frames' [CLS] tokens.
    """

    tokens: Tensor
    pooled: Tensor


class VideoEncoder(nn.Module):
    """Encodes videos [batch, num_frames, 3, height, width] with an image ViT that mixes tokens.

    All attention layers run on this package's operator: those in ``mixing_layers`` with
    ``mixing``, the others as plain per-frame attention. There are no parameters but the image
    model's, in ``vision_model``. Source: Token Mixing (AAAI 2023), section "Token Mixing".

    Args:
        tower: BLIP's vision tower, converted in place, or the configuration of a new one;
            `blip_vision_config` makes BLIP's own.
        num_frames: frames of a video.
        mixing, mixing_layers: as `mix_tokens` takes them; no layers at all is an image encoder.
    """

    def __init__(
        self,
        tower: BlipVisionModel | BlipVisionConfig,
        *,
        num_frames: int = 8,
        mixing: Mixing | str = "released",
        mixing_layers: Layers = (-1,),
    ) -> None:
        super().__init__()
        if isinstance(tower, BlipVisionConfig):
            tower = BlipVisionModel(tower)
        if not isinstance(tower, BlipVisionModel):
            raise ValueError(
                f"tower must be a BlipVisionModel or a BlipVisionConfig, got {type(tower).__name__}"
            )
        mix_tokens(tower, num_frames, "spatial", layers="all")
        self.vision_model = tower
        tower.encoder.layers = nn.ModuleList(
            VideoLayer(cast(BlipEncoderLayer, layer)) for layer in tower.encoder.layers
        )
        if not isinstance(mixing_layers, str | int):
            mixing_layers = tuple(mixing_layers)
        if mixing_layers != ():
            mix_tokens(self.vision_model, num_frames, mixing, mixing_layers)

    @property
    def config(self) -> BlipVisionConfig:
        return self.vision_model.config

    @property
    def image_size(self) -> int:
        """Side of a frame in pixels."""
        size = self.config.image_size
        assert isinstance(size, int)
        return size

    @property
    def layers(self) -> list[VideoLayer]:
        """The encoder layers, from the lowest."""
        return list(self.vision_model.encoder.layers)  # type: ignore[arg-type]

    @property
    def num_frames(self) -> int:
        """Frames of a video; ValueError if the layers were set apart."""
        frames = {m.num_frames for m in self.modules() if isinstance(m, TokenMixing)}
        if len(frames) != 1:
            raise ValueError(f"layers are set to {sorted(frames)} frames; call set_num_frames")
        return frames.pop()

    def set_num_frames(self, num_frames: int) -> VideoEncoder:
        """Sets the frames of a video; returns the encoder."""
        set_num_frames(self, num_frames)
        # What tuning methods insert may know the frames too.
        for module in self.vision_model.encoder.modules():
            if "num_frames" in vars(module):
                setattr(module, "num_frames", num_frames)  # noqa: B010
        return self

    def forward(self, pixels: Tensor, queries: Queries = "all") -> VideoEncoding:
        """``pixels`` [batch, num_frames, 3, height, width], normalised (`normalize_clip`).

        With ``queries`` "prefix" the last layer computes [CLS] only: tokens are [batch,
        num_frames, 1, dim], for readers that use nothing else.

        Raises ValueError if another number of frames or another size comes than was configured.
        """
        size = self.config.image_size
        wanted = (self.num_frames, 3, size, size)
        if pixels.dim() != 5 or pixels.shape[1:] != wanted:
            raise ValueError(
                f"pixels must be [batch, num_frames, 3, height, width] = "
                f"{['batch', *wanted]}, got {list(pixels.shape)}; VideoEncoder.set_num_frames "
                "changes the frames, image_size at building the size"
            )
        hidden = self.vision_model.embeddings(pixels.flatten(0, 1))
        *lower, last = self.layers
        for layer in lower:
            hidden = layer(hidden)
        hidden = self.vision_model.post_layernorm(last(hidden, queries=queries))
        tokens = hidden.reshape(*pixels.shape[:2], *hidden.shape[1:])
        return VideoEncoding(tokens, tokens[:, :, 0].mean(dim=1))

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        image_size: int | None = None,
        num_frames: int = 8,
        mixing: Mixing | str = "released",
        mixing_layers: Layers = (-1,),
    ) -> VideoEncoder:
        """The vision tower of a transformers BLIP model: a directory or a hub name.

        ``image_size`` other than the model's resizes its position embeddings. Raises ValueError if
        it is not a BLIP model or weights are missing, OSError (of transformers) if not found.
        """
        config = transformers.AutoConfig.from_pretrained(model)
        known = {"blip": "BlipForConditionalGeneration", "blip_vision_model": "BlipVisionModel"}
        if config.model_type not in known:
            raise ValueError(f"{model} is a {config.model_type!r} model, wanted a BLIP one")
        architecture = (config.architectures or [known[config.model_type]])[0]
        if architecture not in WITH_TOWER:
            raise ValueError(
                f"{model} is a {architecture}, wanted one of {', '.join(sorted(WITH_TOWER))}"
            )
        loaded, info = getattr(transformers, architecture).from_pretrained(
            model, output_loading_info=True
        )
        tower = loaded if isinstance(loaded, BlipVisionModel) else loaded.vision_model
        prefix = "" if tower is loaded else "vision_model."
        missing = sorted(name for name in info["missing_keys"] if name.startswith(prefix))
        if missing:
            raise ValueError(f"{model} lacks weights of its vision tower: {_some(missing)}")
        vision_config = copy.deepcopy(tower.config)
        if image_size is not None:
            vision_config.image_size = image_size
        encoder = cls(
            vision_config, num_frames=num_frames, mixing=mixing, mixing_layers=mixing_layers
        )
        encoder._load(tower.state_dict(), str(model))
        return encoder

    @classmethod
    def from_blip_state_dict(
        cls,
        state_dict: Mapping[str, Any] | str | os.PathLike[str],
        *,
        image_size: int,
        num_heads: int,
        patch_size: int = 16,
        num_frames: int = 8,
        mixing: Mixing | str = "released",
        mixing_layers: Layers = (-1,),
    ) -> VideoEncoder:
        """The vision tower of an original BLIP checkpoint, as published with BLIP.

        ``state_dict``: a mapping or a file, opened with ``weights_only=True``; names such as
        ``visual_encoder.blocks.0.attn.qkv.weight``, with or without the prefix, or all of it under
        ``"model"``. Position embeddings of another grid than image_size / patch_size are resized
        bicubically. Width and depth follow from the weights. Raises ValueError that names what is
        missing, left over or of another shape.
        """
        source = "state_dict"
        if not isinstance(state_dict, Mapping):
            source = str(state_dict)
            state_dict = _read_checkpoint(Path(state_dict))
        weights = _vision_weights(state_dict, source)
        dim = weights["embeddings.class_embedding"].shape[-1]
        kernel = weights["embeddings.patch_embedding.weight"]
        if kernel.shape[-1] != patch_size or image_size % patch_size:
            raise ValueError(
                f"patch_size = {patch_size} must be that of {source}, {kernel.shape[-1]}, and "
                f"divide image_size = {image_size}"
            )
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads = {num_heads} must divide the width of {source}, {dim}")
        depth = 1 + max(
            int(found.group(1))
            for name in weights
            if (found := re.match(r"encoder\.layers\.(\d+)\.", name))
        )
        config = blip_vision_config(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=dim,
            intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
        )
        encoder = cls(config, num_frames=num_frames, mixing=mixing, mixing_layers=mixing_layers)
        encoder._load(weights, source)
        return encoder

    def _load(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Loads the vision model's weights, position embeddings resized to its grid."""
        own = self.vision_model.state_dict()
        weights = dict(weights)
        name = "embeddings.position_embedding"
        grid = round((own[name].shape[1] - 1) ** 0.5)
        weights[name] = resize_position_embedding(weights[name], grid)
        wrong = [
            f"{name}: {list(weights[name].shape)} instead of {list(own[name].shape)}"
            for name in sorted(own.keys() & weights.keys())
            if weights[name].shape != own[name].shape
        ]
        missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        problems = [
            f"{what} {_some(names)}"
            for what, names in (("missing", missing), ("left over", extra), ("shapes", wrong))
            if names
        ]
        if problems:
            raise ValueError(f"{source} does not fit the vision tower: {'; '.join(problems)}")
        self.vision_model.load_state_dict(weights)


def blip_vision_config(
    architecture: Literal["vit-b16", "vit-l16"] = "vit-b16", *, image_size: int = 224, **other: Any
) -> BlipVisionConfig:
    """BLIP's vision configuration, whose defaults transformers does not have; ``other`` overrides.

    LayerNorm epsilon 1e-6 and initialisation 0.02, as in the published BLIP.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise ValueError(f"architecture must be one of {known}, got {architecture!r}")
    settings: dict[str, Any] = {
        **ARCHITECTURES[architecture],
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
        "initializer_range": 0.02,
        **other,
    }
    settings.setdefault("intermediate_size", 4 * settings["hidden_size"])
    return BlipVisionConfig(image_size=image_size, **settings)


def resize_position_embedding(embedding: Tensor, grid: int) -> Tensor:
    """[1, 1 + n * n, dim] to [1, 1 + grid * grid, dim]: bicubic over the patches, [CLS] kept."""
    patches = embedding.shape[1] - 1 if embedding.dim() == 3 else 0
    side = round(max(patches, 0) ** 0.5)
    if side < 1 or side * side != patches:
        raise ValueError(
            f"position embedding must be [1, 1 + n * n, dim], got {list(embedding.shape)}"
        )
    if side == grid:
        return embedding
    picture = embedding[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
    picture = nn.functional.interpolate(
        picture, size=(grid, grid), mode="bicubic", align_corners=False
    )
    resized = picture.flatten(2).transpose(1, 2).to(embedding.dtype)
    return torch.cat([embedding[:, :1], resized], dim=1)


_RENAMED = (
    (r"cls_token$", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"norm\.", "post_layernorm."),
)


def _vision_weights(state_dict: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The vision weights of an original BLIP checkpoint under transformers' names."""
    if isinstance(state_dict.get("model"), Mapping):
        state_dict = state_dict["model"]
    prefix = "visual_encoder."
    found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    weights = {}
    for name, weight in (found or state_dict).items():
        for pattern, new in _RENAMED:
            if re.match(pattern, name):
                weights[re.sub("^" + pattern, new, name)] = weight
                break
        else:
            weights[name] = weight
    needed = (
        "embeddings.class_embedding",
        "embeddings.position_embedding",
        "embeddings.patch_embedding.weight",
        "encoder.layers.0.mlp.fc1.weight",
    )
    wrong = [name for name, weight in weights.items() if not isinstance(weight, Tensor)]
    missing = [name for name in needed if name not in weights] or wrong
    if missing:
        raise ValueError(
            f"{source} is not an original BLIP checkpoint (visual_encoder.blocks.0.attn.qkv.weight "
            f"and so on): it lacks a tensor for {_some(missing)}; it holds "
            f"{_some(sorted(map(str, state_dict))[:3]) or 'nothing'}"
        )
    return weights


def _read_checkpoint(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except Exception as error:  # whatever the bytes of a damaged file lead to
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint, {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint's mapping")
    return content


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
