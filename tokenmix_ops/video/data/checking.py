"""Which videos of a manifest can be read, and how long it takes: each read as training reads it.

The reading is done by processes of its own, since what decodes a damaged file may hang or crash.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from tokenmix_ops.video.data.clips import ClipError, frame_indices, read_clip
from tokenmix_ops.video.data.image_folder import decode_image, numbered_images
from tokenmix_ops.video.data.isolation import Failure, in_processes
from tokenmix_ops.video.data.manifest import Manifest, Video
from tokenmix_ops.video.data.video_file import Facts, probe, read_frames


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found out about one video, of which only the part from `start` to `end` counts.

    What is not known is None; all that the file tells is so for one that cannot be read.
    """

    video: Video
    path: Path
    status: Literal["ok", "missing", "unreadable"]
    error: str | None = None
    """Why it is not "ok"."""
    duration: float | None = None
    """Seconds; None for a folder of images, too."""
    num_frames: int | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    seconds: float = 0.0
    """How long it took to read the clip, or to find that it cannot be read."""


class Check(NamedTuple):
    """One video to read, and how."""

    video: Video
    path: Path
    num_frames: int
    size: int
    thorough: bool


def check_videos(
    manifest: Manifest,
    videos: Sequence[Video],
    *,
    num_frames: int = 8,
    size: int = 224,
    workers: int = 2,
    thorough: bool = False,
    time_limit: float = 120.0,
) -> Generator[Checked, None, None]:
    """Read a clip of each of `videos` in `workers` processes, and report on them in their order.

    `thorough` decodes all frames too, and so finds damage that the clip does not touch. A process
    that takes more than `time_limit` seconds over a video is killed, and one that a video crashes
    is replaced; either way the video is "unreadable". The processes end with the iterator, and
    with this process. Raises ValueError for arguments out of range, RuntimeError if a process
    cannot start.
    """
    for name, value in (("size", size), ("workers", workers)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}, it must be a whole number, at least 1")
    frame_indices(1, num_frames)
    if not time_limit > 0:
        raise ValueError(f"time_limit is {time_limit}, it must be in seconds, more than 0")
    tasks = [Check(v, manifest.path_of(v), num_frames, size, thorough) for v in videos]
    return _checked(tasks, workers, time_limit)


def _checked(
    tasks: Sequence[Check], workers: int, time_limit: float
) -> Generator[Checked, None, None]:
    with closing(in_processes(examine, tasks, workers, time_limit)) as answers:
        for task, answer in zip(tasks, answers, strict=True):
            if isinstance(answer, Failure):
                video, path, reason = task.video, task.path, answer.reason
                yield Checked(video, path, "unreadable", reason, seconds=answer.seconds)
            else:
                yield answer


def examine(task: Check) -> Checked:
    """Read one video in this process; `check_videos` does so in others."""
    video, path = task.video, task.path
    begun = time.perf_counter()
    found = Checked(video, path, "unreadable")
    try:
        if not path.exists():
            return replace(found, status="missing", error="is not there")
        read_clip(path, task.num_frames, task.size, start=video.start, end=video.end)
        found = replace(found, seconds=time.perf_counter() - begun)
        facts = _facts(path, video.start, video.end, task.thorough)
    except Exception as error:
        # Whatever it is, training would stop at it, and the other videos are to be checked too.
        known = isinstance(error, ClipError | OSError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        seconds = found.seconds or time.perf_counter() - begun
        return replace(found, error=text.removeprefix(f"{path}: "), seconds=seconds)
    return replace(found, status="ok", **facts._asdict())


def _facts(path: Path, start: float | None, end: float | None, thorough: bool) -> Facts:
    if not path.is_dir():
        facts = probe(path, start, end)
        return facts._replace(num_frames=_decoded(path, start, end)) if thorough else facts
    files = numbered_images(path)
    first, *_ = [decode_image(file) for file in (files if thorough else files[:1])]
    return Facts(None, len(files), None, first.width, first.height)


def _decoded(path: Path, start: float | None, end: float | None) -> int:
    """How many frames the span has; raises ClipError if any of them is damaged."""
    low, high = start or 0.0, float("inf") if end is None else end
    number = 0

    def choose(available: int, times: Sequence[float] | None) -> dict[int, list[int]]:
        nonlocal number
        known = times if times is not None else [low] * available
        chosen = {i: [i] for i, t in enumerate(known) if low <= t < high}
        number = len(chosen)
        return chosen

    for _ in read_frames(path, choose, high):
        pass
    return number
