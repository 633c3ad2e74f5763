"""Reading videos for training: clips a second, the start of workers, and memory over many clips.

Videos are H.264 files written for it, a pattern that moves, with x264's default distance between
keyframes. Clips are drawn as in training: 8 frames at random, resized to 224 pixels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Any

import av
import psutil
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from bench.rows import Row
from tokenmix_ops.timing import environment
from tokenmix_ops.video.data.cache import FrameCache
from tokenmix_ops.video.data.dataset import CaptionedClips, collate
from tokenmix_ops.video.data.manifest import Manifest, Video
from tokenmix_ops.video.data.shapes import write_video

MARKS = (10, 50, 100)
"""Percent of the clips after which memory is told."""
PLENTY = 1 << 40


@dataclass(frozen=True)
class Files:
    """What the generated videos are like; of each file there are several, under other names."""

    files: int = 12
    width: int = 320
    height: int = 240
    seconds: float = 10.0
    rate: int = 25


LONG = Files()
"""About what the benchmarks' videos are like."""
SHORT = Files(width=160, height=120, seconds=2.0)
"""For memory, where clips count and not their cost."""


@dataclass(frozen=True)
class Reading:
    """A way to read clips: ``cache`` is "cold" where every clip is met for the first time."""

    workers: int
    fps: float | None = None
    cache: str | None = None


READINGS = (
    *(Reading(workers) for workers in (0, 1, 2)),
    *(Reading(workers, 4.0) for workers in (0, 2)),
    *(Reading(2, 4.0, cache) for cache in ("cold", "warm")),
)


def write_videos(folder: Path, like: Files, names: int) -> Manifest:
    """Videos by ``names`` names, of which some name the same file."""
    folder.mkdir(parents=True)
    videos = []
    for number in range(names):
        path, first = folder / f"{number}.mp4", folder / f"{number % like.files}.mp4"
        if path == first:
            write_video(path, _pattern(like, number), like.rate)
        else:
            os.link(first, path)
        videos.append(Video(path.name, str(number), ("a pattern moves",), "train"))
    return Manifest(tuple(videos), folder)


def _pattern(like: Files, seed: int) -> Tensor:
    """Frames [length, 3, height, width] in 0..1: coarse and fine shapes that a camera pans over."""
    generator = torch.Generator().manual_seed(seed)
    length, size = round(like.seconds * like.rate), (like.height, 2 * like.width)
    scene = torch.zeros(1, 3, *size)
    for cell, strength in ((64, 0.7), (16, 0.2), (4, 0.1)):
        shape = (1, 3, size[0] // cell + 2, size[1] // cell + 2)
        coarse = torch.rand(shape, generator=generator)
        scene += strength * interpolate(coarse, size, mode="bilinear", align_corners=False)
    # Less than the scene's width in all.
    offsets = [i * like.width // length for i in range(length)]
    return torch.stack([scene[0, ..., offset : offset + like.width] for offset in offsets])


def clips_per_second(
    manifest: Manifest, reading: Reading, folder: Path, turn: int, **options: Any
) -> float:
    """Clips a second from when every worker has given its first batch, to the end of a pass.

    Frames are drawn otherwise in every ``turn``. What is "warm" has been filled by "cold", and is
    passed through ten times.
    """
    cache = None if reading.cache is None else FrameCache(folder, PLENTY)
    clips = CaptionedClips(manifest, "train", fps=reading.fps, cache=cache, **options)
    epochs = range(10 * turn, 10 * turn + (10 if reading.cache == "warm" else 1))
    asked = [(epoch, index) for epoch in epochs for index in range(len(clips))]
    batches = iter(_loader(clips, asked, reading.workers, 4))
    for _ in range(max(reading.workers, 1)):
        next(batches)
    begin = time.perf_counter()
    read = sum(len(batch["videos"]) for batch in batches)
    return read / (time.perf_counter() - begin)


def start_seconds(manifest: Manifest, start: str, **options: Any) -> float:
    """Seconds until two workers have started and the first clip is there."""
    clips = CaptionedClips(manifest, "train", **options)
    begin = time.perf_counter()
    batches = iter(_loader(clips, [(0, 0), (0, 1)], 2, 1, start))
    next(batches)
    seconds = time.perf_counter() - begin
    # A worker that is stopped while it works complains.
    for _ in batches:
        pass
    return seconds


def memory_row(manifest: Manifest, count: int, cache: FrameCache | None, **options: Any) -> Row:
    """Memory of this process and two workers together while ``count`` clips are read.

    At each of `MARKS` it is the median of the samples in the tenth of the clips that ends there.
    """
    clips = CaptionedClips(manifest, "train", cache=cache, **options)
    asked = [divmod(i, len(clips)) for i in range(count)]
    every = max(count // 200, 4)
    samples: list[tuple[int, float]] = []
    read, due = 0, 0
    begin = time.perf_counter()
    for batch in _loader(clips, asked, 2, 4):
        read += len(batch["videos"])
        if read >= due:
            samples.append((read, memory_mib()[1]))
            due = read + every
    seconds = time.perf_counter() - begin
    at = {
        mark: median(mib for read, mib in samples if mark - 10 < 100 * read / count <= mark)
        for mark in MARKS
    }
    return {
        "measure": "memory",
        "clips": count,
        "workers": 2,
        "cache": None if cache is None else "warm",
        "kind": memory_mib()[0],
        "mib": {str(mark): round(mib, 1) for mark, mib in at.items()},
        "growth_mib": round(at[MARKS[-1]] - at[MARKS[0]], 1),
        "peak_mib": round(max(mib for _, mib in samples), 1),
        "clips_per_second": round(count / seconds, 1),
    }


def memory_mib() -> tuple[str, float]:
    """Memory of this process and its children; what they share counts once, where that is known."""
    total, kind = 0, "proportional set"
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        info = process.memory_full_info()
        if not hasattr(info, "pss"):
            kind = "resident set"
        total += getattr(info, "pss", info.rss)
    return kind, total / 2**20


def _loader(
    clips: CaptionedClips,
    asked: Sequence[tuple[int, int]],
    workers: int,
    batch: int,
    start: str | None = None,
) -> DataLoader[dict[str, Any]]:
    return DataLoader(
        clips,
        batch,
        # Asked for (epoch, index).
        sampler=asked,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context=start,
        generator=torch.Generator(),
    )


def loading_rows(
    folder: Path,
    *,
    clips: int = 10_000,
    names: int = 48,
    rounds: int = 3,
    size: int = 224,
    long: Files = LONG,
    short: Files = SHORT,
    progress: Callable[[str], object] | None = None,
) -> Iterator[Row]:
    """All that is measured, row by row; videos and caches go to ``folder``.

    In a round all ways of reading come in turn, each with ``names`` clips; ``clips`` are read for
    memory. Raises ValueError for ``names`` below 12, of which too few are timed.
    """
    if names < 12:
        raise ValueError(f"names is {names}, it must be at least 12")
    say = progress or (lambda text: None)
    machine = {**environment(), "av": av.__version__}
    frames = {"num_frames": 8, "size": size}
    say("writing videos")
    manifest = write_videos(folder / "long", long, names)
    about = {"suite": "loading", **frames, "videos": asdict(long), **machine}
    speeds: dict[Reading, list[float]] = {reading: [] for reading in READINGS}
    for turn in range(rounds):
        for reading, found in speeds.items():
            say(f"round {turn + 1}: {reading}")
            speed = clips_per_second(manifest, reading, folder / "timed", turn, **frames)
            found.append(speed)
        rmtree(folder / "timed", ignore_errors=True)
    for reading, found in speeds.items():
        yield {
            "measure": "speed",
            **asdict(reading),
            "clips": names,
            "clips_per_second": round(median(found), 2),
            "rounds": [round(speed, 2) for speed in found],
            **about,
        }
    for start in ("fork", "spawn"):
        say(f"start of workers by {start}")
        seconds = [start_seconds(manifest, start, **frames) for _ in range(rounds)]
        yield {
            "measure": "start",
            "start": start,
            "workers": 2,
            "seconds": round(median(seconds), 2),
            "rounds": [round(s, 2) for s in seconds],
            **about,
        }
    manifest = write_videos(folder / "short", short, short.files)
    cache = FrameCache(folder / "cache", PLENTY)
    # Filled by the first clips.
    for kept in (None, cache):
        say(f"memory over {clips} clips, {'decoded' if kept is None else 'from the cache'}")
        row = memory_row(manifest, clips, kept, **frames)
        yield {**row, **about, "videos": asdict(short)}
