"""``tokenmix caption train`` and ``tokenmix retrieval train``: from the flags to a training run."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.constructors import PrimitiveConstructorSpec

from tokenmix_ops.video.cli.figures import show
from tokenmix_ops.video.experiments.configs import (
    EXPERIMENT_FILE,
    as_yaml,
    overridden,
    read_experiment,
)
from tokenmix_ops.video.experiments.settings import EXPERIMENTS, Captioning, Retrieval
from tokenmix_ops.video.tuning.spec import MethodName


@dataclass(frozen=True)
class RunFlags:
    """What a training run starts from, and where it writes."""

    out: Path
    """Folder for checkpoints, the curve and the saved states."""
    config: Path | None = None
    """Config file, such as one of configs/."""
    backbone: str | None = None
    """Section of the config file to use, such as vit-l16; by default the first."""
    tiny: bool = False
    """Start from a small random model, with settings that suit it, to try things out. token_mixing
    and spatial then update the whole model, unless --everything False says otherwise."""
    resume: bool = False
    """Continue the training run in --out."""
    print_config: bool = False
    """Print the resolved config as YAML and exit."""
    json: bool = False
    """Print the final figures as JSON, and progress on standard error."""


# Each command's task, and where it writes by default.
COMMANDS = {
    "caption": ("captioning", RunFlags(Path("runs/captioning"))),
    "retrieval": ("retrieval", RunFlags(Path("runs/retrieval"))),
}


def _switch(values: Sequence[str]) -> bool | None:
    switches = {"": True, "True": True, "False": False, "None": None}
    text = " ".join(values)
    if text not in switches:
        raise ValueError(f"expected True, False or None, got {text}")
    return switches[text]


@dataclass(frozen=True)
class _StartFlags(RunFlags):
    """The flags that the defaults of all other flags depend on."""

    method: MethodName | None = None
    # Alone, the flag means True.
    everything: Annotated[
        bool | Literal["as configured"] | None,
        PrimitiveConstructorSpec(
            nargs="*",
            metavar="[{None,True,False}]",
            instance_from_str=_switch,
            is_instance=lambda value: True,
            str_from_instance=lambda value: [str(value)],
        ),
    ] = "as configured"


def read_start(command: str, arguments: list[str]) -> tuple[RunFlags, Any, list[str]]:
    """Reads the flags that decide the defaults of the others.

    Returns them, the experiment that the other flags override, and the arguments left to read.
    """
    task, default = COMMANDS[command]
    if arguments[:2] != [command, "train"]:
        return default, EXPERIMENTS[task](), arguments
    asks_for_help = [a for a in arguments if a in ("-h", "--help")]
    start, rest = tyro.cli(
        _StartFlags,
        prog=f"tokenmix {command} train",
        args=[a for a in arguments[2:] if a not in asks_for_help],
        default=_StartFlags(default.out),
        config=(tyro.conf.FlagCreatePairsOff,),
        return_unknown_args=True,
    )
    flags = RunFlags(**{field.name: getattr(start, field.name) for field in fields(RunFlags)})
    return flags, _experiment(task, start), [command, "train", *rest, *asks_for_help]


def _experiment(task: str, start: _StartFlags) -> Any:
    """The experiment of ``--resume``, or of ``--config``, with the tuning and size asked for."""
    tuning: dict[str, Any] = {}
    if start.method is not None:
        tuning["method"] = start.method
    if start.everything != "as configured":
        tuning["everything"] = start.everything
    begun = start.out / EXPERIMENT_FILE
    if start.config is not None:
        experiment = read_experiment(start.config, task, backbone=start.backbone, tuning=tuning)
    elif start.backbone is not None:
        raise ValueError(f"--backbone {start.backbone} names a section of --config FILE: pass both")
    elif start.resume and begun.exists():
        return read_experiment(begun, task, tuning=tuning)
    else:
        experiment = overridden(EXPERIMENTS[task](), {"tuning": tuning})
    if start.tiny:
        # It imports PyTorch.
        from tokenmix_ops.video.experiments.tiny import shrink

        return shrink(experiment)
    return experiment


def train(experiment: Captioning | Retrieval, flags: RunFlags) -> None:
    """Trains and prints the figures, or only prints the resolved config."""
    if flags.print_config:
        print(as_yaml(experiment), end="")
        return
    from accelerate import PartialState

    from tokenmix_ops.video.experiments.running import run

    console = Console(stderr=flags.json, highlight=False)
    figures = run(experiment, flags.out, resume=flags.resume, console=console)
    if not PartialState().is_main_process:
        return
    if flags.json:
        print(jsonlib.dumps(figures))
        return
    best = figures["best"] or figures["last"]
    print(f"{flags.out / ('best' if figures['best'] else 'last')}.safetensors")
    if best is not None:
        show(best, as_json=False)
