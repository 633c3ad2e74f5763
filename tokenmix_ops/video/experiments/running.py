"""Runs an experiment: checks it against the data and an earlier run, and trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from tokenmix_ops.video.data.dataset import CaptionedClips
from tokenmix_ops.video.data.manifest import Manifest, missing, read_manifest
from tokenmix_ops.video.engine.files import replace_text
from tokenmix_ops.video.engine.placement import start_accelerator
from tokenmix_ops.video.engine.store import Store
from tokenmix_ops.video.engine.task import Task
from tokenmix_ops.video.engine.together import raised_on_all
from tokenmix_ops.video.engine.training import train
from tokenmix_ops.video.experiments.building import start
from tokenmix_ops.video.experiments.captioning import CaptionBatch, CaptioningTask
from tokenmix_ops.video.experiments.files import as_yaml, plain, read_experiment
from tokenmix_ops.video.experiments.retrieval import RetrievalTask, TextBatch
from tokenmix_ops.video.experiments.settings import Captioning, Retrieval, Videos

EXPERIMENT_FILE = "experiment.yaml"


def open_data(videos: Videos, *splits: str) -> Manifest:
    """The videos of an experiment.

    Raises ValueError if none are named, a split is empty, or files of a split are not there.
    """
    if videos.data is None:
        raise ValueError(
            "no data given: pass --data FILE.jsonl, with one video a line (video, video_id, "
            "captions, split); tokenmix data shapes FOLDER writes a small one to try"
        )
    try:
        manifest = read_manifest(videos.data, videos.root)
    except OSError as error:
        raise ValueError(f"--data {videos.data} cannot be read: {error.strerror}") from error
    for split in splits:
        absent = missing(manifest, split)
        if absent:
            shown = ", ".join(str(manifest.path_of(video)) for video in absent[:3])
            raise ValueError(
                f"{len(absent)} of {len(manifest.of_split(split))} videos of split {split!r} are "
                f"not there: {shown}{', ...' if len(absent) > 3 else ''}; is --root right?"
            )
    return manifest


def check_captions(manifest: Manifest, split: str, *, each: bool) -> None:
    """Raises ValueError if a split cannot be evaluated: none of its videos, or not ``each``, has
    captions."""
    videos = manifest.of_split(split)
    without = [video.video_id for video in videos if not video.captions]
    if len(without) == len(videos) or (each and without):
        raise ValueError(
            f"{len(without)} of {len(videos)} videos of split {split!r} have no captions to "
            f"compare with: {', '.join(without[:3])}{', ...' if len(without) > 3 else ''}"
        )


def run(
    experiment: Captioning | Retrieval,
    out: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains as an experiment says, into a folder of its own; returns the final figures.

    The folder holds experiment.yaml, best.safetensors and last.safetensors with what was updated,
    the curve, and the states to resume from. Raises ValueError for data, a model or settings that
    do not fit together, and if ``resume`` meets another experiment; see `train` for the rest.
    """
    selecting = experiment.videos.select_on
    splits = ["train"] if selecting == "none" else ["train", selecting]
    try:
        manifest = open_data(experiment.videos, *splits)
    except ValueError as error:
        if selecting != "none" and f"split is {selecting!r}" in str(error):
            raise ValueError(
                f"{error}: choose the best epoch on another split with --select-on, or keep the "
                "last with --select-on none"
            ) from error
        raise
    if selecting != "none":
        check_captions(manifest, selecting, each=isinstance(experiment, Captioning))
    clips = CaptionedClips(
        manifest,
        "train",
        num_frames=experiment.videos.num_frames,
        size=experiment.videos.image_size,
        seed=experiment.training.seed,
    )
    Store(out).check(resume)
    if resume and (out / EXPERIMENT_FILE).exists():
        _same(read_experiment(out / EXPERIMENT_FILE), experiment, out)
    captions = [caption for _, caption in clips.pairs]
    main = start_accelerator(experiment.training).is_main_process
    # The first process writes, a small model and what was downloaded too; the others then read.
    with raised_on_all():
        if main:
            loaded = start(experiment, captions, out, anew=not resume)
            out.mkdir(parents=True, exist_ok=True)
            replace_text(out / EXPERIMENT_FILE, as_yaml(experiment))
    with raised_on_all():
        if not main:
            loaded = start(experiment, captions, out)
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
    )


def _same(earlier: Captioning | Retrieval, experiment: Captioning | Retrieval, out: Path) -> None:
    old, new = _flat(plain(earlier)), _flat(plain(experiment))
    differing = [name for name in new if name not in _FREE and old.get(name) != new[name]]
    if differing:
        changes = ", ".join(f"{n} was {old.get(n)} and is {new[n]}" for n in differing)
        raise ValueError(
            f"{out} is of another experiment: {changes}; give the same, or another --out"
        )


_FREE = ("training.workers", "training.save_every", "videos.data", "videos.root")


def _flat(settings: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{where}{name}.")
        else:
            flat[f"{where}{name}"] = value
    return flat
