"""Checks which videos of a manifest can be read, and how fast, the way training reads them.

Separate processes do the reading, because decoding a damaged file may hang or crash.
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
    """The result of checking one video, within its `start` and `end`.

    Unknown values are None, including all file properties of an unreadable video.
    """

    video: Video
    path: Path
    status: Literal["ok", "missing", "unreadable"]
    error: str | None = None
    """Why the status is not "ok"."""
    duration: float | None = None
    """Seconds; None for a folder of images."""
    num_frames: int | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    seconds: float = 0.0
    """Time to read the clip, or to fail."""


class Check(NamedTuple):
    """A video to read, and its settings."""

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
    """Read a clip of each of `videos` in `workers` processes, and yield results in order.

    `thorough` also decodes all frames, to find damage outside the clip. A video is "unreadable" if
    it crashes its process or takes more than `time_limit` seconds; a new process then takes over.
    All processes end with the iterator and with this process. Raises ValueError for arguments out
    of range, RuntimeError if a process cannot start.
    """
    for name, value in (("size", size), ("workers", workers)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    frame_indices(1, num_frames)
    if not time_limit > 0:
        raise ValueError(f"time_limit must be above 0 seconds, got {time_limit}")
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
    """Read one video in this process; `check_videos` runs this in workers."""
    video, path = task.video, task.path
    begun = time.perf_counter()
    found = Checked(video, path, "unreadable")
    try:
        if not path.exists():
            return replace(found, status="missing", error="does not exist")
        read_clip(path, task.num_frames, task.size, start=video.start, end=video.end)
        found = replace(found, seconds=time.perf_counter() - begun)
        facts = _facts(path, video.start, video.end, task.thorough)
    except Exception as error:
        # Any error would stop training, and the remaining videos must still be checked.
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
    """Count the span's frames by decoding them; raise ClipError if any is damaged."""
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
