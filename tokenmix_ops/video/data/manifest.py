"""The annotation format: JSON lines, one video per line.

Each line is an object with ``video`` (a file, or a folder of numbered images, relative to a root),
``video_id``, ``captions`` (a list of strings), ``split`` ("train", "val" or "test") and, for a part
of a file, ``start`` and ``end`` in seconds. Other fields are ignored.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeGuard

from tokenmix_ops.video.files import replace_text

SPLITS = ("train", "val", "test")

# Paths can contain neither NUL nor lone surrogates, and UTF-8 cannot encode the latter.
_UNFIT = re.compile("[\0\ud800-\udfff]")
_WORDS = {
    "no captions": ("video without captions", "videos without captions"),
    "in two splits": ("video in two splits", "videos in two splits"),
}


@dataclass(frozen=True, slots=True)
class Video:
    """One line of a manifest; raises ValueError for an invalid field."""

    video: str
    """A file or a folder of numbered images, relative to the manifest's root."""
    video_id: str
    captions: tuple[str, ...]
    """Required for training; may be empty elsewhere."""
    split: str
    """One of `SPLITS`."""
    start: float | None = None
    """Seconds after the first frame; None means the beginning."""
    end: float | None = None
    """Seconds after the first frame; None means the end."""

    def __post_init__(self) -> None:
        for name, value in (("video", self.video), ("video_id", self.video_id)):
            if not (is_text(value) and value.strip()):
                raise ValueError(f"{name} must be a non-blank string, got {value!r:.80}")
        if not (isinstance(self.captions, tuple) and all(map(is_text, self.captions))):
            raise ValueError(f"captions must be a list of strings, got {self.captions!r:.80}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r:.80}")
        if self.split == "train" and not (self.captions and all(map(str.strip, self.captions))):
            raise ValueError(
                f"a training video needs non-blank captions, got {self.captions!r:.80}"
            )
        for name, time in (("start", self.start), ("end", self.end)):
            if time is not None and not is_time(time):
                raise ValueError(f"{name} must be at least 0 seconds, got {time!r:.80}")
        if self.end is not None and not self.end > (self.start or 0):
            raise ValueError(f"end must be above start = {self.start or 0}, got {self.end}")


_FIELDS = tuple(field.name for field in fields(Video))


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with one annotation or video; the others remain usable."""

    kind: str
    """"duplicate", "empty caption", "no captions", "unknown split", "missing video", ..."""
    where: str
    """The place, such as "line 7"."""
    what: str
    """The problem, and how it was handled."""


@dataclass(frozen=True)
class Manifest:
    """The videos of a manifest, in the order of its lines, and their root folder."""

    videos: tuple[Video, ...]
    root: Path
    problems: tuple[Problem, ...] = ()
    """Problems that dropped something while reading, in the order of the lines."""

    def of_split(self, split: str) -> list[Video]:
        """Return the videos of one split; raise ValueError if it has none."""
        chosen = [video for video in self.videos if video.split == split]
        if not chosen:
            held = [name for name in SPLITS if any(video.split == name for video in self.videos)]
            raise ValueError(
                f"split is {split!r}, but the manifest's splits with videos are: "
                f"{', '.join(held) or 'none'}"
            )
        return chosen

    def path_of(self, video: Video) -> Path:
        """Return the path of a video's file or folder."""
        return self.root / video.video


def read_manifest(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    *,
    strict: bool = False,
) -> Manifest:
    """Read a manifest; videos lie under ``root``, by default the manifest's folder.

    Accepts a UTF-8 byte-order mark, CRLF and blank lines. Drops and lists as problems: blank
    captions, training videos without other captions, lines with an unknown split, and lines that
    repeat a ``video_id``. Raises ValueError with file and line if a line is not a JSON object or
    has a missing or invalid field, and with ``strict`` at the first problem; OSError if the file
    cannot be read.
    """
    path = Path(path)
    videos: list[Video] = []
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                video, found = _parse(line)
                if video is not None and lines.setdefault(video.video_id, number) != number:
                    first = lines[video.video_id]
                    what = f"video_id {video.video_id!r:.80} already appears in line {first}"
                    video, found = None, [*found, ("duplicate", what)]
                if found and strict:
                    raise ValueError(found[0][1])
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            problems.extend(Problem(kind, f"line {number}", what) for kind, what in found)
            if video is not None:
                videos.append(video)
    return Manifest(tuple(videos), path.parent if root is None else Path(root), tuple(problems))


def summary(problems: Iterable[Problem]) -> str:
    """Summarise problems in one line: "2 duplicates, 1 empty caption"."""
    counts = Counter(problem.kind for problem in problems)
    return ", ".join(
        f"{count:,} {_WORDS.get(kind, (kind, kind + 's'))[count > 1]}"
        for kind, count in counts.items()
    )


def write_manifest(path: str | os.PathLike[str], videos: Iterable[Video]) -> Path:
    """Write a manifest atomically and return its path.

    Raises ValueError for a duplicate ``video_id``, OSError if it cannot be written.
    """
    path = Path(path)
    lines: dict[str, str] = {}
    for video in videos:
        if video.video_id in lines:
            raise ValueError(f"{path}: expected unique video_ids, got {video.video_id!r} twice")
        values = ((name, getattr(video, name)) for name in _FIELDS)
        record = {name: value for name, value in values if value is not None}
        lines[video.video_id] = json.dumps(record, ensure_ascii=False) + "\n"
    replace_text(path, "".join(lines.values()))
    return path


def missing(manifest: Manifest, split: str) -> list[Video]:
    """Return the videos of a split that do not exist; raise ValueError as `of_split` does."""
    return [video for video in manifest.of_split(split) if not manifest.path_of(video).exists()]


def _parse(line: bytes) -> tuple[Video | None, list[tuple[str, str]]]:
    """Return a line's video, None to drop it, and the kind and text of each problem."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8; convert the file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"is not JSON: {error}; each line must be an object as written by tokenmix data prepare"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, got {record!r:.80}")
    absent = [name for name in ("video", "video_id", "captions", "split") if name not in record]
    if absent:
        raise ValueError(f"lacks {', '.join(absent)}")
    captions, split = record["captions"], record["split"]
    known = split in SPLITS or not is_text(split)
    texts = isinstance(captions, list) and all(map(is_text, captions))
    kept = tuple(filter(str.strip, captions)) if texts else captions
    speechless = split == "train" and kept == ()
    # Validate a video that will be dropped as a test video, which needs no captions.
    video = Video(
        video=record["video"],
        video_id=record["video_id"],
        captions=tuple(kept) if isinstance(kept, list) else kept,
        split=split if known and not speechless else "test",
        start=record.get("start"),
        end=record.get("end"),
    )
    if known and not speechless and len(kept) == len(captions):
        return video, []
    name = f"video_id {video.video_id!r:.80}"
    problems = []
    if len(kept) < len(captions):
        blank = [index for index, text in enumerate(captions) if not text.strip()]
        problems += [("empty caption", f"{name}: caption {index} is blank") for index in blank]
    if not known:
        options = ", ".join(SPLITS)
        what = f"{name}: split must be one of {options}, got {split!r:.80}"
        problems.append(("unknown split", what))
    if speechless:
        problems.append(("no captions", f"{name}: a training video needs captions"))
    return video if known and not speechless else None, problems


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is a string that a manifest can store."""
    if not isinstance(value, str):
        return False
    # ASCII needs only this much faster check.
    return "\0" not in value if value.isascii() else _UNFIT.search(value) is None


def is_time(value: object) -> TypeGuard[float]:
    """Whether a value is a time in seconds that a manifest can store."""
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value < math.inf
