"""BLIP's models with their weights: transformers directories, hub models, original checkpoints."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)

from tokenmix_ops.video.encoder import (
    ARCHITECTURES,
    blip_vision_config,
    resize_position_embedding,
)
from tokenmix_ops.video.hub import model_folder
from tokenmix_ops.video.text import SPECIAL_TOKENS

Task = Literal["captioning", "retrieval"]
Blip = BlipForConditionalGeneration | BlipForImageTextRetrieval

MODELS: dict[str, type[Any]] = {
    "captioning": BlipForConditionalGeneration,
    "retrieval": BlipForImageTextRetrieval,
}
"""The model of transformers for each task."""

TRAINING = {
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "label_smoothing": 0.1,
}
"""How BLIP's text side trains; published directories hold 0, which suits inference alone."""

_PARTS = {
    "captioning": {"vision_model", "text_decoder"},
    "retrieval": {"vision_model", "text_encoder", "vision_proj", "text_proj", "itm_head"},
}
_FILES = ("config.json", "model*.safetensors*", "pytorch_model*.bin*")
_ADVICE = (
    "--model takes a model directory, an original BLIP .pth file or a hub name, and --tiny builds "
    "a small random model instead; BLIP's weights are published by Salesforce on the Hugging Face "
    "hub (Salesforce/blip-image-captioning-base and -large for captioning, "
    "Salesforce/blip-itm-base-coco and -large-coco for retrieval), and the .pth files are linked "
    "from github.com/salesforce/BLIP"
)
# Index buffers, momentum encoders, queues with their pointers, and the temperature.
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


def blip_config(
    backbone: Literal["vit-b16", "vit-l16"],
    task: Task,
    *,
    image_size: int = 224,
    vocab_size: int = 30524,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    **other: Any,
) -> BlipConfig:
    """BLIP's configuration, whose values are not transformers' defaults.

    Text: heads of 64 channels, dropouts and label smoothing of 0.1, cross-attention over the
    vision width; the last two words are [DEC] and [ENC]. Vision: `blip_vision_config`. ``vision``,
    ``text`` and ``other`` override values of the vision, text and whole configuration. Raises
    ValueError for an unknown backbone or task.
    """
    if backbone not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise ValueError(f"backbone must be one of {known}, got {backbone!r}")
    settings: dict[str, Any] = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "vocab_size": vocab_size,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": 102,
        "sep_token_id": 102,
        "pad_token_id": 0,
        "is_decoder": True,
        "initializer_range": 0.02,
        **TRAINING,
        **(text or {}),
    }
    settings.setdefault("num_attention_heads", settings["hidden_size"] // 64)
    settings.setdefault("intermediate_size", 4 * settings["hidden_size"])
    tower = blip_vision_config(backbone, image_size=image_size, **(vision or {}))
    return BlipConfig(
        text_config=settings,
        vision_config=tower.to_dict(),
        architectures=[_model_class(task).__name__],
        **{"image_text_hidden_size": 256, "initializer_range": 0.02, **other},
    )


def build_blip(config: BlipConfig, task: Task) -> Blip:
    """The task's model with random weights; under ``torch.device("meta")`` without any."""
    return _model_class(task)(config)


def tiny_blip(
    task: Task,
    vocab_size: int,
    *,
    image_size: int = 56,
    patch_size: int = 8,
    vision_layers: int = 3,
    text_layers: int = 2,
) -> Blip:
    """A random BLIP 64 wide with 4 heads, for `CaptionTokenizer.from_captions`' vocabulary.

    Its weights are drawn wider than BLIP's by the root of the widths' ratio, so that a layer's
    output is as large beside its input as in BLIP, and training from scratch starts as quickly.
    """
    width, heads, sep = 64, 4, SPECIAL_TOKENS.index("[SEP]")
    deviation = 0.02 * math.sqrt(768 / width)
    shape = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "initializer_range": deviation,
    }
    config = blip_config(
        "vit-b16",
        task,
        image_size=image_size,
        vocab_size=vocab_size,
        vision={**shape, "num_hidden_layers": vision_layers, "patch_size": patch_size},
        text={
            **shape,
            "num_hidden_layers": text_layers,
            "max_position_embeddings": 64,
            "sep_token_id": sep,
            "eos_token_id": sep,
        },
        image_text_hidden_size=width,
        initializer_range=deviation,
    )
    return build_blip(config, task)


def load_blip(model: str | os.PathLike[str], task: Task, *, image_size: int | None = None) -> Blip:
    """A pre-trained BLIP for a task, in float32 and evaluation mode.

    ``model``: a directory in transformers' format, a name on the Hugging Face hub, or an original
    BLIP checkpoint file. A directory's configuration decides all but the text dropouts and the
    label smoothing, which are those BLIP trains with (`TRAINING`); an original checkpoint gets
    BLIP's configuration (`blip_config`), sizes as its weights have them. ``image_size`` other than
    the model's resizes the position embeddings bicubically. Momentum encoders, queues, the
    temperature and position indices are not part of the model and are passed over; of a
    pre-training checkpoint, so is the other task's part. Raises ValueError if the model is not
    found, not BLIP, of another task, damaged, or if any weight is missing, left over or of another
    shape.
    """
    cls = _model_class(task)
    if Path(model).is_file():
        weights = task_weights(read_original(model), task, str(model))
        config = original_config(weights, task, str(model))
        loaded = _load(cls, None, str(model), config, weights)
    else:
        folder = model_folder(model, _FILES, _ADVICE)
        loaded = _load(cls, folder, str(model), _directory_config(folder, task, str(model)))
    if image_size is not None:
        set_image_size(loaded, image_size)
    return loaded


def set_image_size(model: Blip, image_size: int) -> None:
    """Resizes a model's position embeddings, in place, for images of another size."""
    embeddings = model.vision_model.embeddings
    config: Any = model.config.vision_config
    patch_size = config.patch_size
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(
            f"image_size must be a multiple of the patch size {patch_size}, got {image_size}"
        )
    grid = image_size // patch_size
    resized = resize_position_embedding(embeddings.position_embedding.detach(), grid)
    embeddings.position_embedding = nn.Parameter(resized)
    embeddings.num_patches, embeddings.num_positions = grid**2, grid**2 + 1
    embeddings.image_size = config.image_size = image_size


def read_original(model: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of an original BLIP checkpoint file under transformers' names.

    All of them: with momentum encoders, queues and temperature, which keep their names. The file
    is opened with ``weights_only=True``. Raises ValueError if it cannot be read or is not one.
    """
    try:
        content = torch.load(model, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of a damaged file lead to
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{model} cannot be read as a PyTorch checkpoint, {reason}") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{model} holds a {type(content).__name__}, not a checkpoint's mapping")
    if "visual_encoder.cls_token" not in content:
        raise ValueError(
            f"{model} is not an original BLIP checkpoint (visual_encoder.cls_token and so on), it "
            f"holds {_some(sorted(map(str, content)), 3) or 'nothing'}; give the directory of a "
            "model in transformers' format"
        )
    wrong = [str(name) for name, weight in content.items() if not isinstance(weight, Tensor)]
    if wrong:
        raise ValueError(f"{model} holds other things than tensors: {_some(wrong)}")
    return {_renamed(name): weight for name, weight in content.items()}


def task_weights(weights: Mapping[str, Tensor], task: Task, source: str) -> dict[str, Tensor]:
    """The weights of `read_original` that a task's model takes or that nothing accounts for.

    Raises ValueError if the checkpoint is of another task.
    """
    kept = {n: w for n, w in weights.items() if not _NOT_IN_MODEL.match(n)}
    there = {name.partition(".")[0] for name in kept}
    if lacking := sorted(_PARTS[task] - there):
        raise ValueError(
            f"{source} is not a BLIP {task} checkpoint: it holds {', '.join(sorted(there))}, but "
            f"no {', '.join(lacking)}; {_ADVICE}"
        )
    if there >= set().union(*_PARTS.values()):  # BLIP's pre-training trains both tasks at once
        other = set().union(*_PARTS.values()) - _PARTS[task]
        kept = {n: w for n, w in kept.items() if n.partition(".")[0] not in other}
    return kept


def original_config(weights: Mapping[str, Tensor], task: Task, source: str) -> BlipConfig:
    """BLIP's configuration with the sizes that the weights of `task_weights` have.

    Heads have 64 channels, as in every published BLIP. Raises ValueError if a weight that tells a
    size is missing or of other dimensions.
    """
    text = "text_decoder.bert." if task == "captioning" else "text_encoder."

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in weights or weights[name].dim() != dimensions:
            found = list(weights[name].shape) if name in weights else "nothing"
            raise ValueError(
                f"{source} does not fit BLIP: {name} must be a tensor of {dimensions} dimensions, "
                f"got {found}"
            )
        return tuple(weights[name].shape)

    width, _, patch_size, _ = shape("vision_model.embeddings.patch_embedding.weight", 4)
    positions = shape("vision_model.embeddings.position_embedding", 3)[1]
    vocab_size, text_width = shape(f"{text}embeddings.word_embeddings.weight", 2)
    for name, value in (("vision", width), ("text", text_width)):
        if value % 64:
            raise ValueError(f"{source} has a {name} width of {value}, wanted a multiple of 64")
    projected: dict[str, Any] = {}
    if task == "retrieval":
        projected["image_text_hidden_size"] = shape("vision_proj.weight", 2)[0]
    return blip_config(
        "vit-b16",
        task,
        image_size=patch_size * math.isqrt(max(positions - 1, 0)),
        vocab_size=vocab_size,
        vision={
            "hidden_size": width,
            "num_attention_heads": width // 64,
            "num_hidden_layers": _depth(weights, "vision_model.encoder.layers."),
            "intermediate_size": shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
            "patch_size": patch_size,
        },
        text={
            "hidden_size": text_width,
            "num_hidden_layers": _depth(weights, f"{text}encoder.layer."),
            "intermediate_size": shape(f"{text}encoder.layer.0.intermediate.dense.weight", 2)[0],
            "max_position_embeddings": shape(f"{text}embeddings.position_embeddings.weight", 2)[0],
        },
        **projected,
    )


def _model_class(task: str) -> type[Any]:
    if task not in MODELS:
        raise ValueError(f"task must be 'captioning' or 'retrieval', got {task!r}")
    return MODELS[task]


def _directory_config(folder: Path, task: Task, source: str) -> BlipConfig:
    """A directory's configuration, made to train as BLIP trains; refuses other models."""
    try:
        config = AutoConfig.from_pretrained(str(folder))
    except Exception as error:  # no config.json, or whatever a damaged one leads to
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{source} has no readable config.json, {reason}; {_ADVICE}") from error
    wanted = MODELS[task].__name__
    found = (config.architectures or [wanted])[0] if config.model_type == "blip" else None
    if found != wanted:
        raise ValueError(
            f"{source} is a {found or config.model_type} model, wanted a {wanted} for {task}; "
            f"{_ADVICE}"
        )
    config.text_config.update({**TRAINING, "is_decoder": True})
    return config


def _load(
    cls: type[Any],
    folder: Path | None,
    source: str,
    config: BlipConfig,
    weights: dict[str, Tensor] | None = None,
) -> Blip:
    """A model from a directory or from weights, with nothing missing and nothing left over."""
    try:
        loaded, info = cls.from_pretrained(
            folder,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are named below, with what else is wrong
            output_loading_info=True,
        )
    except Exception as error:  # no weights, or whatever the bytes of a damaged file lead to
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{source} has no readable weights, {reason}") from error
    shapes = (f"{n}: {list(a)} instead of {list(b)}" for n, a, b in info["mismatched_keys"])
    extra = (name for name in info["unexpected_keys"] if not _NOT_IN_MODEL.match(name))
    found = (("missing", info["missing_keys"]), ("left over", extra), ("shapes", shapes))
    problems = [f"{what} {_some(names)}" for what, given in found if (names := sorted(given))]
    if problems:
        raise ValueError(f"{source} does not fit {cls.__name__}: {'; '.join(problems)}")
    if cls is BlipForConditionalGeneration:
        head = loaded.text_decoder.cls.predictions
        tied = head.decoder.weight is loaded.text_decoder.bert.embeddings.word_embeddings.weight
        if not tied or head.decoder.bias is not head.bias:
            raise ValueError(
                f"{source} holds two different copies of what BLIP shares: "
                "text_decoder.cls.predictions.decoder and the word embeddings or predictions.bias"
            )
    return loaded


def _renamed(name: str) -> str:
    prefix = "visual_encoder."
    if not name.startswith(prefix):
        return name
    name = name.removeprefix(prefix)
    for pattern, new in _RENAMED:
        if re.match(pattern, name):
            name = re.sub("^" + pattern, new, name)
            break
    return f"vision_model.{name}"


def _depth(weights: Iterable[str], prefix: str) -> int:
    """Layers, by the highest number that follows a prefix; 1 if there is none."""
    numbers = [re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in weights]
    return 1 + max((int(number.group(1)) for number in numbers if number), default=0)


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
