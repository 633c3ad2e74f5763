"""BLIP's configurations, and BLIP models with random weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipVisionConfig,
)

from tokenmix_ops.video.text import SPECIAL_TOKENS

TaskName = Literal["captioning", "retrieval"]
Blip = BlipForConditionalGeneration | BlipForImageTextRetrieval

_MODELS: dict[str, type[Any]] = {
    "captioning": BlipForConditionalGeneration,
    "retrieval": BlipForImageTextRetrieval,
}

TRAINING = {
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "label_smoothing": 0.1,
}
"""Training values for BLIP's text side; published directories store 0, for inference only."""

ARCHITECTURES = {
    "vit-b16": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "vit-l16": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
}
"""The paper's backbones: BLIP ViT-B/16 and ViT-L/16."""


def blip_vision_config(
    architecture: Literal["vit-b16", "vit-l16"] = "vit-b16", *, image_size: int = 224, **other: Any
) -> BlipVisionConfig:
    """Return BLIP's vision configuration; ``other`` overrides values.

    transformers' defaults differ: BLIP uses LayerNorm epsilon 1e-6 and initialisation std 0.02.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise ValueError(f"expected architecture to be one of {known}, got {architecture!r}")
    settings: dict[str, Any] = {
        **ARCHITECTURES[architecture],
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
        "initializer_range": 0.02,
        **other,
    }
    settings.setdefault("intermediate_size", 4 * settings["hidden_size"])
    return BlipVisionConfig(image_size=image_size, **settings)


def model_class(task: str) -> type[Any]:
    """Return the transformers class for a task; raise ValueError for an unknown task."""
    if task not in _MODELS:
        raise ValueError(f"expected task to be 'captioning' or 'retrieval', got {task!r}")
    return _MODELS[task]


def blip_config(
    backbone: Literal["vit-b16", "vit-l16"],
    task: TaskName,
    *,
    image_size: int = 224,
    vocab_size: int = 30524,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    **other: Any,
) -> BlipConfig:
    """Return BLIP's configuration, which differs from transformers' defaults.

    Text: 64 channels per head, dropout and label smoothing 0.1, cross-attention over the vision
    width; the last two vocabulary entries are [DEC] and [ENC]. Vision: `blip_vision_config`.
    ``vision``, ``text`` and ``other`` override values of the vision, text and top-level
    configuration. Raises ValueError for an unknown backbone or task.
    """
    if backbone not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise ValueError(f"expected backbone to be one of {known}, got {backbone!r}")
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
        architectures=[model_class(task).__name__],
        **{"image_text_hidden_size": 256, "initializer_range": 0.02, **other},
    )


def build_blip(config: BlipConfig, task: TaskName) -> Blip:
    """Build the task's model with random weights, or none under ``torch.device("meta")``."""
    return model_class(task)(config)


def tiny_blip(
    task: TaskName,
    vocab_size: int,
    *,
    image_size: int = 56,
    patch_size: int = 8,
    vision_layers: int = 3,
    text_layers: int = 2,
) -> Blip:
    """Build a random BLIP, 64 wide with 4 heads, for a `CaptionTokenizer.from_captions` vocabulary.

    The initialisation std is BLIP's times the square root of the width ratio. Layer outputs then
    have BLIP's scale relative to their inputs, and training from scratch starts as fast.
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
