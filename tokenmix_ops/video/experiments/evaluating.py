"""What is done with a trained model: scoring it, captioning videos, writing it out whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from rich.console import Console

from tokenmix_ops.video.blip import TaskName
from tokenmix_ops.video.captioning import VideoCaptioner
from tokenmix_ops.video.data.clips import ClipError, normalize_clip, read_clip
from tokenmix_ops.video.engine.placement import start_accelerator
from tokenmix_ops.video.engine.progress import Evaluation, Progress
from tokenmix_ops.video.experiments.building import Loaded, load_checkpoint, load_whole
from tokenmix_ops.video.experiments.captioning_task import caption_split, write_captions
from tokenmix_ops.video.experiments.configs import overridden
from tokenmix_ops.video.experiments.retrieval_task import rank_split
from tokenmix_ops.video.experiments.settings import Captioning, Opening, Retrieval, Videos
from tokenmix_ops.video.experiments.splits import Splits
from tokenmix_ops.video.export import export
from tokenmix_ops.video.metrics.caption_files import write_predictions
from tokenmix_ops.video.metrics.captions import (
    CaptionScores,
    Tokenizer,
    caption_scores,
    scorers,
)

E = TypeVar("E", Captioning, Retrieval)

_AS_IT_IS = Opening()


def evaluate_captions(
    checkpoint: str,
    data: Path,
    root: Path | None,
    split: str,
    *,
    opening: Opening = _AS_IT_IS,
    num_beams: int | None = None,
    max_unreadable: float = 0.0,
    tokenizer: Tokenizer = "auto",
    meteor: bool = True,
    out: Path | None = None,
    **reading: Any,
) -> tuple[CaptionScores | None, dict[str, str]]:
    """Scores and captions of a split; no scores on other processes than the first.

    The captions are in ``out``, COCO-style JSON, before they are scored.
    Figures are of fewer videos, and say so, if some may be and are left out as unreadable.
    """
    scorers()
    loaded, experiment = open_model(checkpoint, Captioning(), opening)
    if num_beams is not None:
        experiment = replace(experiment, decoding=replace(experiment.decoding, num_beams=num_beams))
    experiment = _reading(_of(experiment, data, root, max_unreadable), reading)
    accelerator = start_accelerator(experiment.training)
    with _progress(accelerator) as progress:
        splits = _open_split(experiment, split, accelerator, progress)
        splits.check_captions(split, each=True)
        loaded.model.to(accelerator.device)
        with _advising():
            captions = caption_split(loaded, splits, split, experiment, accelerator, progress)
    if not accelerator.is_main_process:
        return None, captions
    references = {video.video_id: video.captions for video in splits.manifest.of_split(split)}
    if out is not None:
        write_predictions(out, captions)
    return caption_scores(captions, references, tokenizer=tokenizer, meteor=meteor), captions


def evaluate_ranking(
    checkpoint: str,
    data: Path,
    root: Path | None,
    split: str,
    *,
    opening: Opening = _AS_IT_IS,
    rerank: int | None = None,
    max_unreadable: float = 0.0,
    **reading: Any,
) -> dict[str, float] | None:
    """Retrieval figures of a split, and how many videos; None on other processes than the first.

    They are of fewer videos, and say so, if some may be and are left out as unreadable.
    """
    loaded, experiment = open_model(checkpoint, Retrieval(), opening)
    if rerank is not None:
        experiment = replace(experiment, rerank=rerank)
    experiment = _reading(_of(experiment, data, root, max_unreadable), reading)
    accelerator = start_accelerator(experiment.training)
    with _progress(accelerator) as progress:
        splits = _open_split(experiment, split, accelerator, progress)
        loaded.model.to(accelerator.device)
        with _advising():
            figures = rank_split(loaded, splits, split, experiment, accelerator, progress)
    if not accelerator.is_main_process:
        return None
    return {**figures, "videos": len(splits.manifest.of_split(split))}


def predict_captions(
    checkpoint: str,
    videos: Sequence[Path],
    *,
    opening: Opening = _AS_IT_IS,
    num_beams: int | None = None,
    top_p: float | None = None,
    num_captions: int = 1,
    seed: int = 0,
    precision: str = "no",
) -> Iterator[tuple[Path, list[str], str | None]]:
    """(path, captions, None) of each video, or (path, [], why) of one that cannot be read."""
    if num_captions < 1:
        raise ValueError(f"num_captions is {num_captions}, it must be at least 1")
    loaded, experiment = open_model(checkpoint, Captioning(), opening)
    captioner = loaded.model
    assert isinstance(captioner, VideoCaptioner)
    decoding = replace(experiment.decoding, top_p=top_p)
    if num_beams is not None:
        decoding = replace(decoding, num_beams=num_beams)
    accelerator = start_accelerator(_reading(experiment, {"precision": precision}).training)
    captioner.to(accelerator.device)
    torch.manual_seed(seed)
    reads = experiment.videos
    for path in videos:
        try:
            clip = read_clip(path, reads.num_frames, reads.image_size, fps=reads.fps)
        except ClipError as error:
            yield path, [], str(error)
            continue
        pixels = normalize_clip(clip)[None].to(accelerator.device)
        with accelerator.autocast():
            captions = write_captions(captioner, loaded.tokenizer, pixels, decoding, num_captions)
        yield path, captions, None


def export_checkpoint(
    task: TaskName,
    checkpoint: Path,
    out: Path,
    model: str | None = None,
    tokenizer: str | None = None,
) -> Path:
    """Writes a whole transformers model directory of a checkpoint; returns it."""
    loaded, description = load_checkpoint(checkpoint, model, tokenizer)
    if description.task != task:
        raise ValueError(f"{checkpoint}: expected task {task}, got {description.task}")
    return export(loaded.model, out, loaded.tokenizer)


def open_model(checkpoint: str, default: E, opening: Opening = _AS_IT_IS) -> tuple[Loaded, E]:
    """A checkpoint with its experiment, or a whole model with the default one.

    ``checkpoint`` may be a training's folder: its best checkpoint is opened, or its last if it
    selected none. Raises ValueError if the checkpoint is missing, belongs to another task, or does
    not fit ``opening``.
    """
    task = default.task
    written = (Path(checkpoint) / f"{name}.safetensors" for name in ("best", "last"))
    checkpoint = next((str(path) for path in written if path.is_file()), checkpoint)
    if Path(checkpoint).suffix != ".safetensors":
        if opening.model is not None:
            raise ValueError(f"{checkpoint} is a whole model: leave --model {opening.model} out")
        whole = load_whole(
            task,
            checkpoint,
            num_frames=opening.num_frames,
            image_size=opening.image_size,
            tokenizer=opening.tokenizer,
        )
        encoder = whole.model.encoder
        videos = Videos(
            num_frames=encoder.num_frames, image_size=encoder.image_size, fps=opening.fps
        )
        return whole, replace(default, videos=videos)
    loaded, description = load_checkpoint(checkpoint, opening.model, opening.tokenizer)
    if description.task != task:
        raise ValueError(f"{checkpoint}: expected task {task}, got {description.task}")
    settings = {name: value for name, value in description.settings.items() if name != "task"}
    try:
        experiment = overridden(default, settings)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    for flag, wanted, own in (
        ("--num-frames", opening.num_frames, description.num_frames),
        ("--image-size", opening.image_size, description.image_size),
        ("--fps", opening.fps, experiment.videos.fps),
    ):
        if wanted not in (None, own):
            raise ValueError(
                f"{checkpoint} was trained with {flag} {own}, got {wanted}: leave it out"
            )
    # A checkpoint written from Python need not hold any settings.
    videos = replace(
        experiment.videos, num_frames=description.num_frames, image_size=description.image_size
    )
    return loaded, replace(experiment, videos=videos)


def _progress(accelerator: Accelerator) -> Evaluation:
    quiet = not accelerator.is_main_process
    return Evaluation(Console(stderr=True, quiet=quiet, highlight=False))


def _of(experiment: E, data: Path, root: Path | None, max_unreadable: float) -> E:
    """The experiment with other videos, read as its own."""
    videos = replace(
        experiment.videos,
        data=data,
        root=root,
        max_unreadable=max_unreadable,
        strict=False,
        cache=None,
    )
    return replace(experiment, videos=videos)


def _open_split(
    experiment: Captioning | Retrieval, split: str, accelerator: Accelerator, progress: Progress
) -> Splits:
    splits = Splits(experiment.videos, split, say=progress.say)
    splits.drop_unreadable(split, experiment.training.workers, accelerator, progress)
    return splits


@contextmanager
def _advising() -> Iterator[None]:
    """Adds to what is wrong with a clip what can be done."""
    try:
        yield
    except ClipError as error:
        raise ClipError(
            f"{error}; --max-unreadable 0.1 leaves out up to a tenth of the videos"
        ) from error


def _reading(experiment: E, reading: dict[str, Any]) -> E:
    return replace(experiment, training=replace(experiment.training, **reading))
