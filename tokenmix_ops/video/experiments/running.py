"""Runs an experiment: checks it against the data and an earlier run, and trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tokenmix_ops.video.data.dataset import CaptionedClips
from tokenmix_ops.video.data.unreadable import Unreadable
from tokenmix_ops.video.engine.files import replace_text
from tokenmix_ops.video.engine.placement import start_accelerator
from tokenmix_ops.video.engine.progress import Evaluation, say
from tokenmix_ops.video.engine.store import Store
from tokenmix_ops.video.engine.task import Task
from tokenmix_ops.video.engine.together import raised_on_all
from tokenmix_ops.video.engine.training import train
from tokenmix_ops.video.experiments.building import start
from tokenmix_ops.video.experiments.captioning import CaptionBatch, CaptioningTask
from tokenmix_ops.video.experiments.configs import EXPERIMENT_FILE, as_yaml, plain, read_experiment
from tokenmix_ops.video.experiments.data import (
    check_captions,
    only_readable,
    open_cache,
    open_data,
)
from tokenmix_ops.video.experiments.retrieval import RetrievalTask, TextBatch
from tokenmix_ops.video.experiments.settings import Captioning, Retrieval


def run(
    experiment: Captioning | Retrieval,
    out: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains as an experiment says, into a folder of its own; returns the final figures.

    The folder holds experiment.yaml, best.safetensors and last.safetensors with what was updated,
    the curve, the states to resume from, and unreadable.jsonl, if videos could not be read. Raises
    ValueError for data, a model or settings that do not fit together, and if ``resume`` meets
    another experiment; see `train` for the rest.
    """
    videos = experiment.videos
    accelerator = start_accelerator(experiment.training)
    main = accelerator.is_main_process
    console = (console or Console()) if main else Console(quiet=True)
    selecting = videos.select_on
    splits = ["train"] if selecting == "none" else ["train", selecting]
    try:
        manifest, counts = open_data(videos, *splits, say=partial(say, console))
    except ValueError as error:
        if selecting != "none" and f"split is {selecting!r}" in str(error):
            raise ValueError(
                f"{error}: choose the best epoch on another split with --select-on, or keep the "
                "last with --select-on none"
            ) from error
        raise
    if selecting != "none":
        check_captions(manifest, selecting, each=isinstance(experiment, Captioning))
    present = manifest.of_split("train")
    unreadable = Unreadable(
        out / "unreadable.jsonl", present, videos.max_unreadable, counts["train"] - len(present)
    )
    cache = open_cache(videos)
    if cache is not None:
        taken = f"{cache.taken() / 2**30:.1f} of {videos.cache_gib:g} GiB"
        hint = "" if videos.fps else "; with --fps 4 it would need far less"
        say(console, f"{cache.folder} keeps decoded frames, {taken} so far{hint}")
    clips = CaptionedClips(
        manifest,
        "train",
        num_frames=videos.num_frames,
        size=videos.image_size,
        fps=videos.fps,
        cache=cache,
        seed=experiment.training.seed,
        unreadable=unreadable,
    )
    with raised_on_all():
        Store(out).check(resume)
    if resume and (out / EXPERIMENT_FILE).exists():
        _same(read_experiment(out / EXPERIMENT_FILE), experiment, out)
    captions = [caption for _, caption in clips.pairs]
    # The first process writes, a small model and what was downloaded too; the others then read.
    with raised_on_all():
        if main:
            loaded = start(experiment, captions, out, anew=not resume)
            out.mkdir(parents=True, exist_ok=True)
            if not resume:
                unreadable.path.unlink(missing_ok=True)
            replace_text(out / EXPERIMENT_FILE, as_yaml(experiment))
    with raised_on_all():
        if not main:
            loaded = start(experiment, captions, out)
    if selecting != "none":
        # An hour of training should not end where its evaluation begins.
        with Evaluation(console) as progress:
            manifest = only_readable(
                manifest,
                selecting,
                counts,
                videos,
                experiment.training.workers,
                accelerator,
                progress,
            )
    task: Task
    collate: Callable[[list[Any]], Any]
    if isinstance(experiment, Captioning):
        task = CaptioningTask(loaded, experiment, manifest)
        collate = CaptionBatch(loaded.tokenizer, experiment.max_tokens)
    else:
        task = RetrievalTask(loaded, experiment, manifest)
        collate = TextBatch(loaded.tokenizer, experiment.max_tokens)
    return train(
        task,
        clips,
        experiment.training,
        out,
        collate=collate,
        resume=resume,
        select_on=None if selecting == "none" else selecting,
        console=console,
        remark=unreadable.remark,
    )


def _same(earlier: Captioning | Retrieval, experiment: Captioning | Retrieval, out: Path) -> None:
    old, new = _flat(plain(earlier)), _flat(plain(experiment))
    differing = [name for name in new if name not in _FREE and old.get(name) != new[name]]
    if differing:
        changes = ", ".join(f"{n} was {old.get(n)} and is {new[n]}" for n in differing)
        raise ValueError(
            f"{out} is of another experiment: {changes}; give the same, or another --out"
        )


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
