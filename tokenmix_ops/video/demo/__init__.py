"""The demo: shows on video files, in minutes, what token mixing can do and plain attention cannot.

It (a) writes clips and reads them back, (b) encodes a clip and its reverse, (c) trains a small
tower with and without mixing on the direction of motion, (d) times one attention layer, and
(e) draws a picture.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from tokenmix_ops.peer_layers import (
    LAYER_SHAPE,
    about_backend,
    blip_sized_layers,
    summary,
    time_layers,
)
from tokenmix_ops.timing import Timings, environment
from tokenmix_ops.video.data.clips import ClipError, normalize_clip
from tokenmix_ops.video.data.shapes import render, sample_scenes, write_world
from tokenmix_ops.video.data.suffixes import VIDEO_SUFFIXES, is_video_name
from tokenmix_ops.video.demo import motion
from tokenmix_ops.video.demo.picture import draw

CHANCE, WANTED = 0.25, 0.80


class DemoError(RuntimeError):
    """The demo cannot continue, or missed its target accuracy."""


def run(
    out: Path, videos: Path | None, *, steps: int, clips: int, rounds: int, console: Console
) -> dict[str, Any]:
    """Run the demo; return its figures and write them to ``out``/demo.json.

    With a folder of ``videos``, run (a), (b) and (d) on its files and skip (c). Raises DemoError if
    no clip can be read or, in (c), if mixing does not reach 80 %.
    """
    for name, value, least in (("steps", steps, 2), ("clips", clips, 1), ("rounds", rounds, 1)):
        if value < least:
            raise DemoError(f"{name} must be at least {least}, got {value}")
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"environment": environment()}
    if videos is None:
        paths, labels = _write_clips(out / "world", clips, console)
    else:
        paths, labels = _find_videos(videos), None
    pixels, paths, unreadable = _read_clips(paths, console)
    figures["clips"] = {"read": len(paths), "unreadable": unreadable}
    if labels is not None and unreadable:
        raise DemoError("cannot read the clips just written: is the disk full?")
    if labels is not None:
        figures["clips"]["psnr_db"] = _fidelity(pixels, len(labels), console)
    figures["reversal"] = _compare_reversed(pixels, console)
    curves: dict[str, list[float]] = {}
    predictions: dict[str, Tensor] = {}
    if labels is not None:
        curves = _train(steps, pixels, predictions, console)
        figures["accuracy"] = _accuracies(predictions, labels, console)
        figures["loss"] = {name: curve[-1] for name, curve in curves.items()}
    timings = _time_layer(rounds, console)
    figures["layer_ms"] = {
        name: {c: round(1e3 * median(s), 2) for c, s in of_pass.items()}
        for name, of_pass in timings.items()
    }
    picture = draw(out / "demo.png", pixels, labels, predictions, curves, timings)
    (out / "demo.json").write_text(json.dumps(figures, indent=1))
    console.print(f"(e) picture: {picture}   figures: {out / 'demo.json'}")
    if labels is not None and figures["accuracy"]["released"] <= WANTED:
        raise DemoError(
            f"expected token mixing to exceed {WANTED:.0%}, got "
            f"{figures['accuracy']['released']:.0%}: train longer with --steps (now {steps})"
        )
    return figures


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("    {task.description:<34}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _write_clips(folder: Path, clips: int, console: Console) -> tuple[list[Path], Tensor]:
    console.print("[bold](a) Video files[/bold]: coloured shapes that move left, right, up or down")
    with _bars(console) as bars:
        task = bars.add_task("writing H.264 files", total=clips, note="")
        annotations = write_world(
            folder,
            clips,
            seed=2023,
            num_frames=motion.NUM_FRAMES,
            progress=lambda done: bars.update(task, completed=done),
        )
    videos = json.loads(annotations.read_text())["videos"]
    labels = torch.tensor([video["category"] for video in videos])
    return [folder / "videos" / f"{video['video_id']}.mp4" for video in videos], labels


def _find_videos(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DemoError(f"{folder} is not a folder: pass a folder of videos")
    paths = sorted(path for path in folder.rglob("*") if is_video_name(path.name))
    if not paths:
        raise DemoError(f"expected video files ({', '.join(VIDEO_SUFFIXES)}) in {folder}, got none")
    return paths


def _read_clips(paths: list[Path], console: Console) -> tuple[Tensor, list[Path], dict[str, str]]:
    clips, readable, unreadable = [], [], {}
    with _bars(console) as bars:
        task = bars.add_task(
            f"reading {motion.NUM_FRAMES} frames of each", total=len(paths), note=""
        )
        for path in paths:
            try:
                clips.append(motion.read([path])[0])
                readable.append(path)
            except ClipError as error:
                unreadable[str(path)] = str(error)
                console.print(f"    skipped: {error}")
            bars.advance(task)
    if not clips:
        raise DemoError("none of the videos is readable")
    return torch.stack(clips), readable, unreadable


def _fidelity(pixels: Tensor, count: int, console: Console) -> float:
    generator = torch.Generator().manual_seed(2023)
    rendered = render(sample_scenes(count, motion.NUM_FRAMES, generator), motion.IMAGE_SIZE)
    psnr = float(-10 * (pixels - rendered).square().mean().log10())
    console.print(f"    PSNR of the decoded files: {psnr:.1f} dB")
    return round(psnr, 2)


def _compare_reversed(pixels: Tensor, console: Console) -> dict[str, Any]:
    """Compare embeddings of clips and their reverses, from towers with the same weights."""
    console.print("[bold](b) A clip and its reverse[/bold], same random weights in both towers")
    table = Table("tower", "frame embeddings", "difference of pooled embedding", box=None)
    clips = normalize_clip(pixels[:16])
    figures = {}
    for name in ("spatial", "released"):
        encoder = motion.build(name).encoder.eval()
        with torch.no_grad():
            forwards, backwards = encoder(clips), encoder(clips.flip(1))
        same = torch.equal(forwards.tokens, backwards.tokens.flip(1))
        difference = (forwards.pooled - backwards.pooled).norm(dim=-1)
        relative = float((difference / forwards.pooled.norm(dim=-1)).mean())
        figures[name] = {"frames_equal": same, "pooled_relative_difference": relative}
        table.add_row(
            f"    {name}",
            "bit-identical" if same else "depend on the order",
            f"{relative:.1e} of its norm",
        )
    console.print(table)
    return figures


def _train(
    steps: int, pixels: Tensor, predictions: dict[str, Tensor], console: Console
) -> dict[str, list[float]]:
    """Train both towers in parallel threads and fill in ``predictions``."""
    console.print(
        f"[bold](c) Learning the direction of motion[/bold] in {steps} batches of "
        f"{motion.BATCH} clips"
    )
    names = ("spatial", "released")
    models = {name: motion.build(name) for name in names}
    stopped = threading.Event()
    threads = torch.get_num_threads()

    def one(name: str) -> list[float]:
        torch.set_num_threads(max(1, threads // len(names)))

        def report(done: int, loss: float) -> None:
            if stopped.is_set():
                raise DemoError("stopped")
            bars.update(tasks[name], completed=done, note=f"loss {loss:.2f}")

        return motion.train(models[name], steps, progress=report)

    with _bars(console) as bars, ThreadPoolExecutor(len(names)) as pool:
        tasks = {name: bars.add_task(f"{name} tower", total=steps, note="") for name in names}
        futures = {name: pool.submit(one, name) for name in names}
        try:
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:
            # After Ctrl-C or an error in one thread, stop the other too.
            stopped.set()
        for future in done:
            future.result()
        curves = {name: future.result() for name, future in futures.items()}
    torch.set_num_threads(threads)
    for name, model in models.items():
        predictions[name] = motion.predict(model, pixels)
    return curves


def _accuracies(
    predictions: dict[str, Tensor], labels: Tensor, console: Console
) -> dict[str, float]:
    table = Table("tower", "accuracy on the files", "", box=None)
    remarks = {
        "spatial": f"chance is {CHANCE:.0%}",
        "released": "same parameters",
    }
    accuracies = {}
    for name, predicted in predictions.items():
        accuracies[name] = float((predicted == labels).float().mean())
        table.add_row(f"    {name}", f"{accuracies[name]:.1%} of {len(labels)}", remarks[name])
    console.print(table)
    return accuracies


def _time_layer(rounds: int, console: Console) -> dict[str, Timings]:
    console.print("[bold](d) One attention layer[/bold] of BLIP ViT-B/16, its projections included")
    with _bars(console) as bars:
        task = bars.add_task("rounds", total=2 * rounds, note="")
        timings = time_layers(
            blip_sized_layers(),
            **LAYER_SHAPE,
            rounds=rounds,
            progress=lambda done, total: bars.update(task, completed=done),
        )
    table = Table("layer", *timings, "against plain SDPA", box=None)
    for layer, *cells in summary(timings):
        table.add_row(f"    {layer}", *cells)
    console.print(table)
    console.print(f"    {about_backend()}")
    return timings
