"""Runs an experiment: opens the data, builds the model, trains."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tokenmix_ops.video.data.dataset import CaptionedClips
from tokenmix_ops.video.engine.loop import train
from tokenmix_ops.video.engine.placement import start_accelerator
from tokenmix_ops.video.engine.progress import Evaluation, say
from tokenmix_ops.video.engine.store import Store
from tokenmix_ops.video.engine.together import raised_on_all
from tokenmix_ops.video.experiments.building import Loaded, start
from tokenmix_ops.video.experiments.captioning_task import CaptioningTask
from tokenmix_ops.video.experiments.configs import EXPERIMENT_FILE, as_yaml, plain, read_experiment
from tokenmix_ops.video.experiments.retrieval_task import RetrievalTask
from tokenmix_ops.video.experiments.settings import Captioning, Retrieval
from tokenmix_ops.video.experiments.splits import Splits
from tokenmix_ops.video.files import replace_text


def run(
    experiment: Captioning | Retrieval,
    out: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains an experiment into a folder of its own; returns the final figures.

    The folder holds experiment.yaml, best.safetensors and last.safetensors with the updated
    parameters, the curve, the states to resume from, and unreadable.jsonl if videos could not be
    read. Raises ValueError for data, a model or settings that do not fit together, and if
    ``resume`` meets another experiment; see `train` for the rest.
    """
    accelerator = start_accelerator(experiment.training)
    main = accelerator.is_main_process
    console = (console or Console()) if main else Console(quiet=True)
    select_on = experiment.videos.selection
    splits, clips = _open_data(experiment, out, console)
    _check_folder(experiment, out, resume)
    loaded = _build_model(experiment, clips, out, resume=resume, main=main)
    if select_on is not None:
        # An hour of training should not end where its evaluation begins.
        with Evaluation(console) as progress:
            splits.drop_unreadable(select_on, experiment.training.workers, accelerator, progress)
    task: CaptioningTask | RetrievalTask
    if isinstance(experiment, Captioning):
        task = CaptioningTask(loaded, experiment, splits)
    else:
        task = RetrievalTask(loaded, experiment, splits)
    return train(
        task,
        clips,
        experiment.training,
        out,
        collate=task.collate,
        resume=resume,
        select_on=select_on,
        console=console,
        remark=clips.unreadable.remark if clips.unreadable is not None else None,
    )


def _open_data(
    experiment: Captioning | Retrieval, out: Path, console: Console
) -> tuple[Splits, CaptionedClips]:
    """The splits to train and to choose the best epoch on, and the clips to train on."""
    select_on = experiment.videos.selection
    names = ["train"] if select_on is None else ["train", select_on]
    try:
        splits = Splits(experiment.videos, *names, say=partial(say, console))
    except ValueError as error:
        if select_on is not None and f"split is {select_on!r}" in str(error):
            raise ValueError(
                f"{error}: choose the best epoch on another split with --select-on, or keep the "
                "last with --select-on none"
            ) from error
        raise
    if select_on is not None:
        splits.check_captions(select_on, each=isinstance(experiment, Captioning))
    if (cache := splits.describe_cache()) is not None:
        say(console, cache)
    return splits, splits.training_clips(out / "unreadable.jsonl", experiment.training.seed)


def _check_folder(experiment: Captioning | Retrieval, out: Path, resume: bool) -> None:
    """Raises ValueError for a folder that holds a training run already, or another to resume."""
    with raised_on_all():
        Store(out).check(resume)
    if not resume or not (out / EXPERIMENT_FILE).exists():
        return
    old, new = _flat(plain(read_experiment(out / EXPERIMENT_FILE))), _flat(plain(experiment))
    differing = [name for name in new if name not in _FREE and old.get(name) != new[name]]
    if differing:
        changes = ", ".join(f"{n} was {old.get(n)} and is {new[n]}" for n in differing)
        raise ValueError(
            f"{out} holds another experiment: {changes}; pass the same settings or another --out"
        )


def _build_model(
    experiment: Captioning | Retrieval,
    clips: CaptionedClips,
    out: Path,
    *,
    resume: bool,
    main: bool,
) -> Loaded:
    """The model to train on every process, and on the first one what a new folder needs."""
    captions = [caption for _, caption in clips.pairs]
    # The first process writes, a small model and what was downloaded too; the others then read.
    with raised_on_all():
        if main:
            loaded = start(experiment, captions, out, fresh=not resume)
            out.mkdir(parents=True, exist_ok=True)
            if not resume and clips.unreadable is not None:
                clips.unreadable.path.unlink(missing_ok=True)
            replace_text(out / EXPERIMENT_FILE, as_yaml(experiment))
    with raised_on_all():
        if not main:
            loaded = start(experiment, captions, out)
    return loaded


# Settings that may differ when a run is resumed.
_FREE = (
    *("training.workers", "training.save_every"),
    *(f"videos.{name}" for name in ("data", "root", "cache", "cache_gib", "max_unreadable")),
)


def _flat(settings: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{where}{name}.")
        else:
            flat[f"{where}{name}"] = value
    return flat
