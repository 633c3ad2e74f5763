"""Loads BLIP weights from transformers directories, the hub and original checkpoints."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipVisionConfig,
    BlipVisionModel,
)

from tokenmix_ops.video.blip import (
    TRAINING,
    Blip,
    TaskName,
    blip_config,
    blip_vision_config,
    model_class,
)
from tokenmix_ops.video.hub import model_folder

WITH_TOWER = (
    "BlipForConditionalGeneration",
    "BlipForImageTextRetrieval",
    "BlipForQuestionAnswering",
    "BlipModel",
    "BlipVisionModel",
)
"""The transformers models that contain BLIP's vision tower."""

_PARTS = {
    "captioning": {"vision_model", "text_decoder"},
    "retrieval": {"vision_model", "text_encoder", "vision_proj", "text_proj", "itm_head"},
}
_FILES = ("config.json", "model*.safetensors*", "pytorch_model*.bin*")
_TOWER = "vision_model."
_ADVICE = (
    "--model takes a model directory, an original BLIP .pth file or a hub name; --tiny builds a "
    "small random model instead. Salesforce publishes BLIP on the Hugging Face hub "
    "(Salesforce/blip-image-captioning-base and -large for captioning, "
    "Salesforce/blip-itm-base-coco and -large-coco for retrieval); "
    "github.com/salesforce/BLIP links the .pth files"
)
_TOWER_ADVICE = (
    "from_pretrained takes a model directory or a hub name, such as "
    "Salesforce/blip-image-captioning-base; from_blip_state_dict takes original BLIP checkpoints"
)
# Index buffers, momentum encoders, queues and their pointers, and the temperature.
_NOT_IN_MODEL = re.compile(r"(.*\.)?position_ids$|\w+_m\.|\w+_queue$|queue_ptr$|temp$")
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


def load_blip(
    model: str | os.PathLike[str], task: TaskName, *, image_size: int | None = None
) -> Blip:
    """Load a pre-trained BLIP for a task, in float32 and eval mode.

    ``model``: a directory in transformers' format, a name on the Hugging Face hub, or an original
    BLIP checkpoint file. A directory's own configuration applies, except for the text dropouts and
    the label smoothing, which take BLIP's training values (`TRAINING`); an original checkpoint gets
    BLIP's configuration (`blip_config`) with sizes read from its weights. Resizes the position
    embeddings bicubically if ``image_size`` differs from the model's. Ignores momentum encoders,
    queues, the temperature, position indices and, in a pre-training checkpoint, the other task's
    modules. Raises ValueError if the model is not found, not BLIP, for another task or damaged, or
    if a weight is missing, unexpected or wrongly shaped.
    """
    cls, source = model_class(task), str(model)
    if Path(model).is_file():
        weights = task_weights(read_original(model, source), task, source)
        loaded = _load(cls, None, source, original_config(weights, task, source), weights)
    else:
        folder = model_folder(model, _FILES, _ADVICE)
        _, config = _directory_config(folder, source, (cls.__name__,), _ADVICE)
        config.text_config.update({**TRAINING, "is_decoder": True})
        loaded = _load(cls, folder, source, config)
    if cls is BlipForConditionalGeneration:
        head = loaded.text_decoder.cls.predictions
        tied = head.decoder.weight is loaded.text_decoder.bert.embeddings.word_embeddings.weight
        if not tied or head.decoder.bias is not head.bias:
            raise ValueError(
                f"{source} is damaged: BLIP ties text_decoder.cls.predictions.decoder to the word "
                "embeddings and predictions.bias, but here they differ"
            )
    if image_size is not None:
        set_image_size(loaded.vision_model, image_size)
    return loaded


def load_tower(model: str | os.PathLike[str], *, image_size: int | None = None) -> BlipVisionModel:
    """Load the vision tower of a BLIP model, in float32 and eval mode.

    ``model``: a directory in transformers' format or a name on the Hugging Face hub, for any model
    in `WITH_TOWER`. ``image_size`` as in `load_blip`. Raises ValueError if it is another model or
    damaged, or if a tower weight is missing, unexpected or wrongly shaped; ModelNotFound, an
    OSError, if it does not exist.
    """
    folder = model_folder(model, _FILES, _TOWER_ADVICE)
    name, config = _directory_config(folder, str(model), WITH_TOWER, _TOWER_ADVICE)
    cls = getattr(transformers, name)
    alone = cls is BlipVisionModel
    loaded = _load(cls, folder, str(model), config, part="" if alone else _TOWER)
    tower: BlipVisionModel = loaded if alone else loaded.vision_model
    if image_size is not None:
        set_image_size(tower, image_size)
    return tower


def original_tower(
    checkpoint: Mapping[str, Any] | str | os.PathLike[str],
    *,
    image_size: int,
    num_heads: int,
    patch_size: int,
) -> BlipVisionModel:
    """Load the vision tower of an original BLIP checkpoint, in float32 and eval mode.

    ``checkpoint``: as in `read_original`. The weights determine width and depth. Resizes the
    position embeddings bicubically if their grid is not image_size / patch_size. Raises ValueError
    if an argument does not fit the weights, or if a weight is missing, unexpected or wrongly
    shaped.
    """
    source = "state_dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
    weights = read_original(checkpoint, source, "visual_encoder.")
    sizes = _vision_sizes(weights, source)
    if sizes["patch_size"] != patch_size:
        raise ValueError(
            f"expected patch_size={sizes['patch_size']}, as in {source}, got {patch_size}"
        )
    if num_heads < 1 or sizes["hidden_size"] % num_heads:
        raise ValueError(
            f"expected num_heads to divide {sizes['hidden_size']}, the width of {source}, "
            f"got {num_heads}"
        )
    config = blip_vision_config(num_attention_heads=num_heads, **sizes)
    # Clone, or the model would train the caller's tensors.
    weights = {name.removeprefix(_TOWER): weight.clone() for name, weight in weights.items()}
    tower: BlipVisionModel = _load(BlipVisionModel, None, source, config, weights)
    set_image_size(tower, image_size)
    return tower


def set_image_size(tower: BlipVisionModel, image_size: int) -> None:
    """Resize a tower's position embeddings in place for another image size."""
    embeddings, config = tower.embeddings, tower.config
    patch_size: Any = config.patch_size
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(
            f"expected image_size to be a multiple of the patch size {patch_size}, got {image_size}"
        )
    grid = image_size // patch_size
    resized = resize_position_embedding(embeddings.position_embedding.detach(), grid)
    embeddings.position_embedding = nn.Parameter(resized)
    embeddings.num_patches, embeddings.num_positions = grid**2, grid**2 + 1
    embeddings.image_size = config.image_size = image_size


def resize_position_embedding(embedding: Tensor, grid: int) -> Tensor:
    """Resize [1, 1 + n * n, dim] to [1, 1 + grid * grid, dim] bicubically; [CLS] is unchanged."""
    patches = embedding.shape[1] - 1 if embedding.dim() == 3 else 0
    side = round(max(patches, 0) ** 0.5)
    if side < 1 or side * side != patches:
        raise ValueError(
            f"expected a position embedding [1, 1 + n * n, dim], got {list(embedding.shape)}"
        )
    if side == grid:
        return embedding
    picture = embedding[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
    picture = nn.functional.interpolate(
        picture, size=(grid, grid), mode="bicubic", align_corners=False
    )
    resized = picture.flatten(2).transpose(1, 2).to(embedding.dtype)
    return torch.cat([embedding[:, :1], resized], dim=1)


def read_original(
    checkpoint: Mapping[str, Any] | str | os.PathLike[str], source: str, part: str = ""
) -> dict[str, Tensor]:
    """Read an original BLIP checkpoint's tensors under transformers' names.

    ``checkpoint``: a file, opened with ``weights_only=True``, or a mapping, with original names,
    with or without the tower's ``visual_encoder.``, or everything under ``"model"``. Returns the
    tensors whose original names start with ``part``; momentum encoders, queues and temperature keep
    their names. Raises ValueError, naming ``source``, if it is unreadable or not such a checkpoint.
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else _unpickled(Path(checkpoint))
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} must hold a mapping of weights, got a {type(content).__name__}")
    if "visual_encoder.cls_token" not in content and "cls_token" in content:
        content = {f"visual_encoder.{name}": weight for name, weight in content.items()}
    if "visual_encoder.cls_token" not in content:
        raise ValueError(
            f"{source} is not an original BLIP checkpoint: expected visual_encoder.cls_token etc., "
            f"got {_some(sorted(map(str, content)), 3) or 'nothing'}; for a model in transformers' "
            "format, pass its directory"
        )
    chosen = {str(name): w for name, w in content.items() if str(name).startswith(part)}
    wrong = [name for name, weight in chosen.items() if not isinstance(weight, Tensor)]
    if wrong:
        raise ValueError(f"{source} holds entries that are not tensors: {_some(wrong)}")
    return {_renamed(name): weight for name, weight in chosen.items()}


def task_weights(weights: Mapping[str, Tensor], task: TaskName, source: str) -> dict[str, Tensor]:
    """Keep the weights from `read_original` that belong to a task's model or are unknown.

    Raises ValueError if the checkpoint is for another task.
    """
    kept = {n: w for n, w in weights.items() if not _NOT_IN_MODEL.match(n)}
    there = {name.partition(".")[0] for name in kept}
    if lacking := sorted(_PARTS[task] - there):
        raise ValueError(
            f"{source} is not a BLIP {task} checkpoint: it holds {', '.join(sorted(there))} but "
            f"lacks {', '.join(lacking)}; {_ADVICE}"
        )
    if there >= set().union(*_PARTS.values()):  # BLIP's pre-training trains both tasks at once
        other = set().union(*_PARTS.values()) - _PARTS[task]
        kept = {n: w for n, w in kept.items() if n.partition(".")[0] not in other}
    return kept


def original_config(weights: Mapping[str, Tensor], task: TaskName, source: str) -> BlipConfig:
    """Build BLIP's configuration with the sizes of `task_weights`.

    Assumes 64 channels per head, as in every published BLIP. Raises ValueError if a weight that
    determines a size is missing or has the wrong number of dimensions.
    """
    text = "text_decoder.bert." if task == "captioning" else "text_encoder."

    def size(name: str, dimension: int = 0) -> int:
        return _shape(weights, name, 2, source)[dimension]

    vision = _vision_sizes(weights, source)
    width, text_width = vision["hidden_size"], size(f"{text}embeddings.word_embeddings.weight", 1)
    for name, value in (("vision", width), ("text", text_width)):
        if value % 64:
            raise ValueError(
                f"expected the {name} width of {source} to be a multiple of 64, got {value}"
            )
    projected: dict[str, Any] = {}
    if task == "retrieval":
        projected["image_text_hidden_size"] = size("vision_proj.weight")
    return blip_config(
        "vit-b16",
        task,
        image_size=vision.pop("image_size"),
        vocab_size=size(f"{text}embeddings.word_embeddings.weight"),
        vision={**vision, "num_attention_heads": width // 64},
        text={
            "hidden_size": text_width,
            "num_hidden_layers": _depth(weights, f"{text}encoder.layer."),
            "intermediate_size": size(f"{text}encoder.layer.0.intermediate.dense.weight"),
            "max_position_embeddings": size(f"{text}embeddings.position_embeddings.weight"),
        },
        **projected,
    )


def _vision_sizes(weights: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The vision configuration's sizes, read from the weights; excludes the number of heads."""
    kernel = _shape(weights, f"{_TOWER}embeddings.patch_embedding.weight", 4, source)
    positions = _shape(weights, f"{_TOWER}embeddings.position_embedding", 3, source)[1]
    hidden = _shape(weights, f"{_TOWER}encoder.layers.0.mlp.fc1.weight", 2, source)
    return {
        "hidden_size": kernel[0],
        "num_hidden_layers": _depth(weights, f"{_TOWER}encoder.layers."),
        "intermediate_size": hidden[0],
        "patch_size": kernel[2],
        "image_size": kernel[2] * math.isqrt(max(positions - 1, 0)),
    }


def _shape(
    weights: Mapping[str, Tensor], name: str, dimensions: int, source: str
) -> tuple[int, ...]:
    if name not in weights or weights[name].dim() != dimensions:
        found = list(weights[name].shape) if name in weights else "nothing"
        raise ValueError(
            f"{source} does not fit BLIP: expected {name} to have {dimensions} dimensions, "
            f"got {found}"
        )
    return tuple(weights[name].shape)


def _directory_config(
    folder: Path, source: str, wanted: Sequence[str], advice: str
) -> tuple[str, Any]:
    """Return a directory's model class, one of ``wanted``, and its configuration."""
    try:
        config = AutoConfig.from_pretrained(str(folder))
    except Exception as error:  # no config.json; a damaged one can raise anything
        raise ValueError(
            f"{source} has no readable config.json ({_reason(error)}); {advice}"
        ) from error
    default = {"blip": wanted[0], "blip_vision_model": "BlipVisionModel"}.get(config.model_type)
    found = (config.architectures or [default])[0] if default else config.model_type
    if found not in wanted:
        raise ValueError(f"{source} must be a {' or '.join(wanted)}, got a {found} model; {advice}")
    return found, config


def _load(
    cls: type[Any],
    folder: Path | None,
    source: str,
    config: BlipConfig | BlipVisionConfig,
    weights: dict[str, Tensor] | None = None,
    part: str = "",
) -> Any:
    """Load a model from a directory or weights; refuse any mismatch within ``part``."""
    try:
        loaded, info = cls.from_pretrained(
            folder,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # reported below with the other problems
            output_loading_info=True,
        )
    except Exception as error:  # no weights; a damaged file can raise anything
        raise ValueError(f"{source} has no readable weights ({_reason(error)})") from error
    shapes = (f"{n}: expected {list(b)}, got {list(a)}" for n, a, b in info["mismatched_keys"])
    extra = (name for name in info["unexpected_keys"] if not _NOT_IN_MODEL.match(name))
    found = (("missing", info["missing_keys"]), ("unexpected", extra), ("shapes", shapes))
    problems = [
        f"{what} {_some(names)}"
        for what, given in found
        if (names := sorted(name for name in given if name.startswith(part)))
    ]
    if problems:
        raise ValueError(f"{source} does not fit {cls.__name__}: {'; '.join(problems)}")
    return loaded


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{path} cannot be read as a PyTorch checkpoint ({_reason(error)})"
        ) from error


def _renamed(name: str) -> str:
    prefix = "visual_encoder."
    if not name.startswith(prefix):
        return name
    name = name.removeprefix(prefix)
    for pattern, new in _RENAMED:
        if re.match(pattern, name):
            name = re.sub("^" + pattern, new, name)
            break
    return f"{_TOWER}{name}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _depth(weights: Iterable[str], prefix: str) -> int:
    """Number of layers: one more than the highest index after ``prefix``, or 1."""
    numbers = [re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in weights]
    return 1 + max((int(number.group(1)) for number in numbers if number), default=0)


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
