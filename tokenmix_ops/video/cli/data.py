"""``tokenmix data``: makes video data, and sees whether it is fit for training."""

from __future__ import annotations

from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import Progress
from tyro.extras import SubcommandApp


def commands() -> SubcommandApp:
    """The subcommands."""
    app = SubcommandApp()
    app.command(shapes)
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
