"""``tokenmix data``: makes video data, and sees whether it is fit for training."""

from __future__ import annotations

import json as jsonlib
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import Progress
from tyro.extras import SubcommandApp


def commands() -> SubcommandApp:
    """The subcommands."""
    app = SubcommandApp()
    app.command(shapes)
    app.command(check)
    app.command(prepare)
    return app


def shapes(
    out: tyro.conf.Positional[Path],
    videos: int = 64,
    seed: int = 0,
    frames: int = 8,
    size: int = 112,
    fps: int = 4,
    still: bool = False,
) -> None:
    """Writes the small video world: clips of moving shapes with captions.

    H.264 files in OUT/videos, captions in MSR-VTT's format in OUT/annotations.json and, for
    training, in OUT/videos.jsonl; the same seed gives the same files.

    Example: tokenmix data shapes world --videos 200 --seed 1

    Args:
        out: folder to write into.
        videos: how many clips.
        seed: what the clips are drawn from.
        frames: frames of a clip, at least 2.
        size: side of the square picture in pixels, even, at least 16.
        fps: frames a second.
        still: the shapes stand still, and captions say what is where, as of images.
    """
    from tokenmix_ops.video.data.shapes import write_world

    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("writing clips", total=videos)
        path = write_world(
            out,
            videos,
            seed=seed,
            num_frames=frames,
            size=size,
            fps=fps,
            still=still,
            progress=lambda done: bars.update(task, completed=done),
        )
    print(path)
    print(path.with_name("videos.jsonl"))


def prepare(
    dataset: tyro.conf.Positional[Literal["msrvtt", "msvd", "vatex", "lsmdc", "lists"]],
    annotations: tyro.conf.Positional[tuple[Path, ...]] = (),
    *,
    videos: Path,
    out: Path,
    task: Literal["captioning", "retrieval"] = "captioning",
    training_list: Literal["9k", "7k"] | None = None,
    train: Path | None = None,
    val: Path | None = None,
    test: Path | None = None,
    drop_missing: bool = False,
    strict: bool = False,
    force: bool = False,
    json: bool = False,
) -> None:
    """Turns the official annotation files of a data set into the one format for training.

    Counts stand beside the official ones. What is wrong with the files is counted and listed, all
    of it in OUT.problems.jsonl.

    Example: tokenmix data prepare msrvtt MSRVTT/annotations --videos MSRVTT/videos --out m.jsonl

    Args:
        dataset: whose files; lists are JSON of the paper's authors, of LAVIS or of COCO's form.
        annotations: its files, or folders to look for them in; for lists see --train.
        videos: folder below which the videos lie, files or folders of numbered images.
        out: file to write, JSON lines, one video a line; its paths start from its own folder.
        task: which splits of MSR-VTT; elsewhere both tasks have the same.
        training_list: which videos of MSR-VTT to train retrieval on; 9k if left out.
        train: for lists, the file with the videos for training.
        val: for lists, the file with the videos for validation.
        test: for lists, the file with the videos for the test.
        drop_missing: leave out videos that are not there, rather than list them all the same.
        strict: stop at the first problem.
        force: replace OUT if it is there.
        json: print the counts and all problems as JSON.
    """
    from rich.markup import escape
    from rich.table import Table

    from tokenmix_ops.video.data.manifest import summary, write_manifest
    from tokenmix_ops.video.data.prepare import prepare as read_and_find

    if out.exists() and not force:
        raise FileExistsError(f"{out} is there already: pass --force, or another --out")
    given = {"train": train, "val": val, "test": test}
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bars:
        task_id = bars.add_task("reading annotations", total=None)
        found = read_and_find(
            dataset,
            annotations,
            videos,
            out.parent,
            splits={split: path for split, path in given.items() if path is not None},
            task=task,
            training_list=training_list,
            strict=strict,
            drop_missing=drop_missing,
            progress=lambda doing, count: bars.update(
                task_id, description=f"{doing}, {count:,} found" if count else doing
            ),
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(out, found.videos)
    listed = out.with_name(out.name + ".problems.jsonl")
    problems = [asdict(problem) for problem in found.problems]
    if problems:
        listed.write_text("".join(jsonlib.dumps(one) + "\n" for one in problems), "utf-8")
    else:
        listed.unlink(missing_ok=True)
    if json:
        splits = {one.split: asdict(one) for one in found.counts}
        print(jsonlib.dumps({"out": str(out), "splits": splits, "problems": problems}))
        return
    table = Table("split", *("videos", "official", "captions", "not there"))
    for column in table.columns[1:]:
        column.justify = "right"
    for one in found.counts:
        official = "" if one.official is None else f"{one.official:,}"
        table.add_row(
            one.split, f"{one.videos:,}", official, f"{one.captions:,}", f"{one.missing:,}"
        )
    screen = Console(highlight=False)
    screen.print(table)
    for kind in dict.fromkeys(problem.kind for problem in found.problems):
        some = [problem for problem in found.problems if problem.kind == kind][:2]
        for problem in some:
            screen.print(escape(f"{problem.where}: {problem.what}"), soft_wrap=True)
    if problems:
        print(f"{summary(found.problems)}; all in {listed}")
    if all(one.missing == one.videos for one in found.counts):
        print(f"None of the videos is in {videos}: is --videos right?")
    print(out)


def check(
    data: tyro.conf.Positional[Path],
    root: Path | None = None,
    split: tuple[Literal["train", "val", "test"], ...] = (),
    num_frames: int = 8,
    image_size: int = 224,
    workers: int = 2,
    thorough: bool = False,
    time_limit: float = 120.0,
    report: Path | None = None,
    strict: bool = False,
    json: bool = False,
) -> None:
    """Finds the videos that are missing or cannot be read, and how long reading takes.

    Each clip is read as for training, in processes that may hang or crash. Of every split: counts,
    durations, frames and sizes; what is wrong with the data, and the time to read an epoch.

    Example: tokenmix data check videos.jsonl --workers 8 --report report.json

    Args:
        data: JSON lines, one video a line.
        root: folder that its paths start from; by default the one of the data.
        split: which videos; all if left out.
        num_frames: frames of a clip.
        image_size: side of a frame in pixels.
        workers: processes that read videos.
        thorough: decode every frame too, which finds damage that a clip does not touch.
        time_limit: seconds for one video, after which it counts as unreadable.
        report: file for the report, JSON.
        strict: exit with status 1 if anything is missing, unreadable or wrong with the data.
        json: print the report as JSON.
    """
    from tokenmix_ops.video.cli.checks import show
    from tokenmix_ops.video.data.check_report import report as figures_of
    from tokenmix_ops.video.data.checking import check_videos
    from tokenmix_ops.video.data.manifest import read_manifest, summary

    if report is not None:
        # Not after an hour of reading.
        report.parent.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(data, root)
    chosen = [video for video in manifest.videos if not split or video.split in split]
    if not chosen:
        wanted = f" in {', '.join(split)}" if split else ""
        found = f": {summary(manifest.problems)}" if manifest.problems else ""
        raise ValueError(f"{data} has no videos{wanted}{found}")
    checks = check_videos(
        manifest,
        chosen,
        num_frames=num_frames,
        size=image_size,
        workers=workers,
        thorough=thorough,
        time_limit=time_limit,
    )
    with Progress(console=Console(stderr=True)) as bars, closing(checks):
        checked = list(bars.track(checks, len(chosen), description="reading videos"))
    figures = figures_of(manifest, checked, num_frames=num_frames, workers=workers)
    if report is not None:
        report.write_text(jsonlib.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if json:
        print(jsonlib.dumps(figures))
    else:
        show(figures, manifest.problems, Console(highlight=False))
    if all(one.status == "missing" for one in checked):
        print(f"tokenmix: no video is below {manifest.root}: is --root right?", file=sys.stderr)
    bad = len(figures["unusable"])
    if strict and (bad or manifest.problems):
        found = f"; {summary(manifest.problems)}" if manifest.problems else ""
        raise ValueError(f"{bad:,} of {len(checked):,} videos are missing or unreadable{found}")
