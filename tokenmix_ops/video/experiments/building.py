"""Builds the models and tokenizers that experiments and checkpoints name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import BlipForConditionalGeneration

from tokenmix_ops.video.blip import Blip, TaskName
from tokenmix_ops.video.captioning import VideoCaptioner
from tokenmix_ops.video.checkpoints import (
    Description,
    TaskModel,
    describe,
    load_updated,
)
from tokenmix_ops.video.experiments import tiny
from tokenmix_ops.video.experiments.settings import Captioning, Retrieval, Videos
from tokenmix_ops.video.retrieval import VideoRetriever
from tokenmix_ops.video.text import CaptionTokenizer
from tokenmix_ops.video.tuning import METHODS, Tuning, apply
from tokenmix_ops.video.weights import load_blip, set_image_size


class Loaded(NamedTuple):
    """A model with its tokenizer, and the model's name as a checkpoint keeps it."""

    model: TaskModel
    tokenizer: CaptionTokenizer
    name: str


def load_image_model(
    task: TaskName,
    name: str,
    *,
    num_frames: int | None = None,
    image_size: int | None = None,
    drop_path: float = 0.0,
    tokenizer: str | None = None,
) -> Loaded:
    """A BLIP model over videos, not yet tuned.

    Raises ValueError as `load_blip` does, and if the tokenizer has words that the model lacks.

    ``num_frames``, ``image_size``: None for what was noted with the model that `export` wrote, else
    for the recipe's, which is not the size that published models have.
    """
    blip = load_blip(name, task, image_size=image_size)
    noted = _noted(blip.config)
    if image_size is None and not noted:
        set_image_size(blip.vision_model, Videos().image_size)
    words = CaptionTokenizer.from_pretrained(tokenizer or name)
    known: int = blip.get_input_embeddings().weight.shape[0]
    if words.vocab_size > known:
        raise ValueError(
            f"the tokenizer {tokenizer or name} has {words.vocab_size} words, more than the "
            f"{known} of {name}; --tokenizer names another"
        )
    if num_frames is None:
        num_frames = int(noted.get("num_frames", Videos().num_frames))
    return Loaded(_over_videos(blip, words, num_frames, drop_path), words, name)


def start(
    experiment: Captioning | Retrieval,
    captions: Sequence[str],
    folder: Path,
    *,
    fresh: bool = False,
) -> Loaded:
    """Builds the model that an experiment starts from and applies the tuning, seeded.

    Raises ValueError as `load_image_model` and `apply` do, for texts longer than the model can
    read, and for an exported model whose mixing the tuning would drop.

    With ``tiny`` it is a small random model, kept in ``folder``; its vocabulary comes from
    ``captions`` unless a tokenizer is named. ``fresh`` replaces one that an earlier run left
    there: a run that does not resume passes it, in the first process alone.
    """
    name = experiment.model
    torch.manual_seed(experiment.training.seed)
    if experiment.tiny:
        home = folder / tiny.FOLDER
        if fresh or not home.exists():
            tiny.write_model(experiment, captions, home)
        name = str(home)
    loaded = load_image_model(
        experiment.task,
        name,
        num_frames=experiment.videos.num_frames,
        image_size=experiment.videos.image_size,
        drop_path=experiment.drop_path,
        tokenizer=None if experiment.tiny else experiment.tokenizer,
    )
    positions: int = loaded.model.blip_config.text_config.max_position_embeddings
    for setting, tokens in (
        ("max_tokens", experiment.max_tokens),
        ("max_length", experiment.decoding.max_length if isinstance(experiment, Captioning) else 0),
    ):
        if tokens > positions:
            raise ValueError(
                f"{setting} is {tokens}, more than the {positions} positions of a text in {name}"
            )
    apply(loaded.model, experiment.tuning)
    _check_mixing(loaded.model, name)
    # A path has to be found from wherever the checkpoint is used.
    here = Path(name).resolve() if Path(name).exists() else name
    return loaded._replace(name=f"./{tiny.FOLDER}" if experiment.tiny else str(here))


def load_checkpoint(
    path: str | os.PathLike[str], model: str | None = None, tokenizer: str | None = None
) -> tuple[Loaded, Description]:
    """A tuned model: a checkpoint on the model that it names, or on ``model``.

    ``tokenizer``: where the vocabulary is, in place of where it says. Raises ValueError if they do
    not fit, or the model is not found.
    """
    description = describe(path)
    name = model or description.model
    is_tiny = bool(description.settings.get("tiny"))
    if model is None and is_tiny:
        name = str(Path(path).parent / name)
    try:
        loaded = load_image_model(
            cast(TaskName, description.task),
            name,
            num_frames=description.num_frames,
            image_size=description.image_size,
            tokenizer=tokenizer or (None if is_tiny else description.settings.get("tokenizer")),
        )
    except ValueError as error:
        if model is not None or Path(name).exists():
            raise
        raise ValueError(
            f"{path} was tuned from {name}, which is not found from here; --model says where it "
            f"is: {error}"
        ) from error
    load_updated(loaded.model, path)
    loaded.model.eval()
    return loaded._replace(name=description.model), description


def load_whole(
    task: TaskName,
    name: str,
    *,
    num_frames: int | None = None,
    image_size: int | None = None,
    tokenizer: str | None = None,
) -> Loaded:
    """A model as it is: an image model frame by frame, or what `export` wrote, mixing as noted."""
    loaded = load_image_model(
        task, name, num_frames=num_frames, image_size=image_size, tokenizer=tokenizer
    )
    noted = _noted(loaded.model.blip_config)
    tuning = Tuning("frozen")
    if noted.get("layers"):
        tuning = Tuning("token_mixing", layers=tuple(noted["layers"]), mixing=noted["mixing"])
    apply(loaded.model, tuning)
    loaded.model.eval()
    return loaded


def _check_mixing(model: TaskModel, name: str) -> None:
    """Raises ValueError if a model that mixed when it was exported does not mix likewise now."""
    noted = _noted(model.blip_config)
    if not noted.get("layers"):
        return
    tuning = model.tuning
    assert tuning is not None
    layers = METHODS[tuning.method].mixing_layers(tuning, len(model.encoder.layers))
    if layers != tuple(noted["layers"]) or tuning.mixing != noted["mixing"]:
        numbers = " ".join(map(str, noted["layers"]))
        raise ValueError(
            f"{name} was exported with layers that mix tokens: to go on with it, pass --method "
            f"token_mixing --mixing {noted['mixing']} --layers {numbers}; else start from an image "
            "model"
        )


def _noted(config: Any) -> dict[str, Any]:
    return getattr(config, "tokenmix", None) or {}


def _over_videos(
    blip: Blip, tokenizer: CaptionTokenizer, num_frames: int, drop_path: float
) -> TaskModel:
    model: TaskModel
    if isinstance(blip, BlipForConditionalGeneration):
        model = VideoCaptioner(blip, num_frames=num_frames)
    else:
        model = VideoRetriever(blip, num_frames=num_frames, enc_token_id=tokenizer.enc)
    depth = len(model.encoder.layers)
    for index, layer in enumerate(model.encoder.layers):
        # It grows from the lowest layer to the highest, as BLIP trains.
        layer.drop_path = drop_path * index / max(1, depth - 1)
    return model
