"""``--tiny``: a small random model to try things out with, and settings that suit it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tokenmix_ops.video.blip import tiny_blip
from tokenmix_ops.video.experiments.settings import Captioning, Retrieval
from tokenmix_ops.video.files import complete_folder
from tokenmix_ops.video.text import CaptionTokenizer, clean_caption
from tokenmix_ops.video.tuning import METHODS

E = TypeVar("E", Captioning, Retrieval)

SIZE, PATCH = 56, 8
"""Sides of a frame and of a patch in pixels. Their grid is 7 × 7: no number of frames divides 7."""

FOLDER = "model"
"""Where a training run keeps the small model that it starts from, in its own folder."""


def shrink(experiment: E) -> E:
    """Returns the experiment with a small random model, and settings that suit it."""
    tuning = experiment.tuning
    # One layer on top of random, frozen ones learns nothing.
    if tuning.everything is None and METHODS[tuning.method].last_layer_only:
        tuning = replace(tuning, everything=True)
    training = replace(
        experiment.training, learning_rate=1e-3, schedule="cosine", warmup_steps=20, workers=0
    )
    videos = replace(experiment.videos, image_size=SIZE)
    if isinstance(experiment, Captioning):
        return replace(experiment, tiny=True, videos=videos, tuning=tuning, training=training)
    # Momentum encoders and queues slow learning down when the weights start random.
    return replace(
        experiment,
        tiny=True,
        videos=videos,
        tuning=tuning,
        training=replace(training, learning_rate=3e-3, weight_decay=0.01, max_grad_norm=1.0),
        contrast=replace(experiment.contrast, queue_size=1, momentum=0.0, alpha=0.0),
    )


def write_model(experiment: Captioning | Retrieval, captions: Iterable[str], home: Path) -> None:
    """Writes the small model, its vocabulary taken from ``captions`` unless a tokenizer is named.

    Replaces an earlier small model. Raises ValueError if ``home`` holds anything else.
    """
    if home.exists() and not _is_small_model(home):
        raise ValueError(f"{home} is no model of --tiny: remove it, or choose another --out")
    tokenizer = (
        CaptionTokenizer.from_captions(map(clean_caption, captions))
        if experiment.tokenizer is None
        else CaptionTokenizer.from_pretrained(experiment.tokenizer)
    )
    blip = tiny_blip(
        experiment.task,
        tokenizer.vocab_size,
        image_size=experiment.videos.image_size,
        patch_size=PATCH,
    )
    blip.config.tokenmix = {"tiny": True, "num_frames": experiment.videos.num_frames}
    with complete_folder(home) as unfinished:
        blip.save_pretrained(unfinished)
        tokenizer.save(unfinished)
        if home.exists():
            shutil.rmtree(home)


def _is_small_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        return bool(config["tokenmix"]["tiny"])
    except (OSError, ValueError, LookupError, TypeError):
        return False
