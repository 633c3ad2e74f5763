"""What ``tokenmix caption`` and ``tokenmix retrieval`` share: defaults, and showing figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from tokenmix_ops.video.experiments.files import EXPERIMENT_FILE, as_yaml, read_experiment
from tokenmix_ops.video.experiments.settings import EXPERIMENTS, Captioning, Retrieval
from tokenmix_ops.video.metrics.captions import CaptionScores

E = TypeVar("E", Captioning, Retrieval)

TASKS = {"caption": "captioning", "retrieval": "retrieval"}
OUT = {"caption": Path("runs/captioning"), "retrieval": Path("runs/retrieval")}
"""Where a command trains unless told."""


def default_experiment(command: str, arguments: list[str]) -> Any:
    """What an experiment is before its flags are read: of ``--config``, and of ``--tiny``; or, to
    ``--resume``, what it was when it began."""
    task = TASKS[command]
    path = _value_of("--config", arguments)
    if path is None and "--resume" in arguments:
        begun = Path(_value_of("--out", arguments) or OUT[command]) / EXPERIMENT_FILE
        if begun.exists():
            return read_experiment(begun, task)
    experiment: Any = EXPERIMENTS[task]() if path is None else read_experiment(path, task)
    return tiny(experiment) if "--tiny" in arguments else experiment


def tiny(experiment: E) -> E:
    """The same with a small random model, and with settings that suit it."""
    training = replace(
        experiment.training, learning_rate=1e-3, schedule="cosine", warmup_steps=20, workers=0
    )
    videos = replace(experiment.videos, image_size=56)
    if isinstance(experiment, Captioning):
        return replace(experiment, tiny=True, videos=videos, training=training)
    # From random weights, momentum encoders and what they remember only hold the learning back.
    return replace(
        experiment,
        tiny=True,
        videos=videos,
        training=replace(training, learning_rate=3e-3, weight_decay=0.01, max_grad_norm=1.0),
        contrast=replace(experiment.contrast, queue_size=1, momentum=0.0, alpha=0.0),
    )


def train(
    experiment: Captioning | Retrieval,
    out: Path,
    tiny: bool,
    resume: bool,
    print_config: bool,
    json_: bool,
) -> None:
    """Trains, or prints the experiment alone."""
    tuning = experiment.tuning
    # Nothing can be learnt on top of random weights that stay as they are.
    if tiny and tuning.everything is None and tuning.method in ("token_mixing", "spatial"):
        experiment = replace(experiment, tuning=replace(tuning, everything=True))
    if print_config:
        print(as_yaml(experiment), end="")
        return
    from accelerate import PartialState

    from tokenmix_ops.video.experiments.running import run

    figures = run(experiment, out, resume=resume, console=Console(stderr=json_, highlight=False))
    if not PartialState().is_main_process:
        return
    if json_:
        print(json.dumps(figures))
    else:
        best = figures["best"] or figures["last"]
        print(f"{out / ('best' if figures['best'] else 'last')}.safetensors")
        if best is not None:
            show(best, as_json=False)


def show(figures: Mapping[str, Any], *, as_json: bool) -> None:
    """Prints figures as JSON, or as a table with one figure a line."""
    if as_json:
        print(json.dumps(figures))
        return
    shown = {name: value for name, value in figures.items() if name not in ("update", "score")}
    table = Table.grid(padding=(0, 2))
    for name, value in shown.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    Console().print(table)


def show_scores(scores: CaptionScores, *, as_json: bool, **more: int) -> None:
    """Prints scores of captions, and why one is not available on standard error."""
    row = scores.row()
    if not as_json:
        row = {name: row[name] for name in row if name in (*scores.figures, "tokenizer")}
    show({**row, **more}, as_json=as_json)
    for name, reason in scores.missing.items():
        print(f"{name} {reason}", file=sys.stderr)


def _value_of(flag: str, arguments: list[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None
