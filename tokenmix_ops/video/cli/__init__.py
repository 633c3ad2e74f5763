"""The command ``tokenmix``: each subcommand parses its arguments and calls one function."""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from rich.table import Table
from tyro.extras import SubcommandApp

from tokenmix_ops.video.cli import caption, data, retrieval, train
from tokenmix_ops.video.cli.score import score

# Commands import what they need when they run, so that --help is quick.


def demo(
    out: Path = Path("demo_out"),
    videos: Path | None = None,
    steps: int = 700,
    clips: int = 256,
    rounds: int = 9,
    json: bool = False,
) -> None:
    """Shows in a few minutes what token mixing does that plain attention cannot.

    Nothing is downloaded. Writes and reads video files, compares a clip with its reverse, trains
    two small towers to tell the direction of motion, times an attention layer, draws a picture.

    Example: tokenmix demo --videos ~/my_videos

    Args:
        out: folder for the picture demo.png, the figures demo.json and the clips.
        videos: a folder of your own videos, in place of generated ones; nothing is trained then.
        steps: training steps of each tower, at least 2.
        clips: how many video files to write and to test on.
        rounds: how often each layer is timed.
        json: print the figures as JSON, and progress on standard error.
    """
    from tokenmix_ops.video import demo as demonstration

    figures = demonstration.run(
        out,
        videos,
        steps=steps,
        clips=clips,
        rounds=rounds,
        console=Console(stderr=json, highlight=False),
    )
    if json:
        print(jsonlib.dumps(figures))


def explain(json: bool = False) -> None:
    """Lists this machine's backends, why others cannot run, and what TOKENMIX_BACKEND requests.

    Example: tokenmix explain --json

    Args:
        json: print JSON, reasons by backend alone; null where a backend can run.
    """
    import torch

    from tokenmix_ops import __version__, backends

    report = backends.machine_report()
    if json:
        print(jsonlib.dumps(report))
        return
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    print(f"tokenmix_ops {__version__}, PyTorch {torch.__version__}, {cuda}")
    for name, reason in report.items():
        print(f"  {name}: {reason or 'can run'}")
    if report["cpu"] is None:
        print(f"CPU kernel: {backends.cpu.description()}")
    if request := backends.environment_request():
        print(request)
    print("For one call: tokenmix_ops.explain(query, key, value, mixing)")


def bench(rounds: int = 21, out: Path | None = None, json: bool = False) -> None:
    """Times an attention layer of BLIP ViT-B/16 against its peers, on the CPU.

    Prints a table; writes a file only if asked to.

    Example: tokenmix bench --rounds 21 --out layer.jsonl

    Args:
        rounds: how often each layer runs; all run in turn in every round.
        out: file to write the rows of data to, JSON lines.
        json: print the rows as JSON lines instead of the table.
    """
    from tokenmix_ops import peer_layers

    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("rounds", total=2 * rounds)
        timings = peer_layers.time_layers(
            peer_layers.blip_sized_layers(),
            **peer_layers.LAYER_SHAPE,
            rounds=rounds,
            progress=lambda done, _: bars.update(task, completed=done),
        )
    lines = [jsonlib.dumps(row) for row in peer_layers.layer_rows(timings)]
    if out is not None:
        out.write_text("".join(f"{line}\n" for line in lines))
    if json:
        print("\n".join(lines))
        return
    table = Table("layer", *timings, "against plain SDPA", box=None)
    for cells in peer_layers.summary(timings):
        table.add_row(*cells)
    Console().print(table)
    print(peer_layers.about_backend())


def params(
    backbone: Literal["vit-b16", "vit-l16"] | None = None,
    task: Literal["captioning", "retrieval"] | None = None,
    json: bool = False,
) -> None:
    """Counts the parameters that each tuning method updates, beside the paper's figures.

    Example: tokenmix params --backbone vit-b16 --task captioning

    Args:
        backbone: BLIP's image tower; both if left out.
        task: both if left out.
        json: print the rows as JSON.
    """
    from tokenmix_ops.video import parameters

    rows = parameters.count(backbone, task)
    if json:
        print(jsonlib.dumps([asdict(row) for row in rows]))
    else:
        Console().print(Markdown(parameters.table(rows)))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; an error the user can mend is one sentence and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app, arguments = _app(arguments)
        app.cli(
            prog="tokenmix",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
            description="Token-mixing attention for video transformers.",
        )
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        sys.exit(f"tokenmix: {_sentence(error)}")
    except KeyboardInterrupt as interrupt:
        print(f"tokenmix: {str(interrupt) or 'stopped'}", file=sys.stderr)
        sys.exit(130)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    lines = str(error).strip().splitlines()
    if not lines:
        return repr(error)
    # A data loader's worker sends its traceback, which ends in the error's class and its text.
    if "Original Traceback" in str(error):
        return lines[-1].partition(": ")[2]
    return " ".join(lines)


def _app(arguments: list[str]) -> tuple[SubcommandApp, list[str]]:
    """Returns all commands, and the arguments that they have yet to parse."""
    app = SubcommandApp()
    for function in (demo, explain, bench, params, score):
        app.command(function)
    app.command(
        data.commands(),
        name="data",
        help="Video data: prepare annotations, check videos, write a small world.",
    )
    flags, captioning, arguments = train.read_start("caption", arguments)
    app.command(
        caption.commands(captioning, flags),
        name="caption",
        help="Video captioning: train, evaluate, predict, export.",
    )
    flags, ranking, arguments = train.read_start("retrieval", arguments)
    app.command(
        retrieval.commands(ranking, flags),
        name="retrieval",
        help="Text-video retrieval: train, evaluate, search, export.",
    )
    return app, arguments
