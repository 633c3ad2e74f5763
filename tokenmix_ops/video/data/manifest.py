"""The one annotation format: JSON lines, one video a line.

Each line is an object with ``video`` (a file, or a folder of numbered images, relative to a root),
``video_id``, ``captions`` (a list of strings), ``split`` ("train", "val" or "test") and, where only
a part of the file is meant, ``start`` and ``end`` in seconds. Further fields are ignored.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

SPLITS = ("train", "val", "test")

# Neither can stand in a path, and a lone surrogate not in a UTF-8 file either.
_UNFIT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Video:
    """One line of a manifest; raises ValueError for a field that cannot be."""

    video: str
    """A file or a folder of numbered images, relative to the manifest's root."""
    video_id: str
    captions: tuple[str, ...]
    """Needed for training; may be empty elsewhere."""
    split: str
    """One of `SPLITS`."""
    start: float | None = None
    """Seconds after the first frame; None for the beginning."""
    end: float | None = None
    """Seconds after the first frame; None for the end."""

    def __post_init__(self) -> None:
        for name, value in (("video", self.video), ("video_id", self.video_id)):
            if not (_is_text(value) and value.strip()):
                raise ValueError(f"{name} must be a string that is not blank, got {value!r:.80}")
        if not (isinstance(self.captions, tuple) and all(map(_is_text, self.captions))):
            raise ValueError(f"captions must be a list of strings, got {self.captions!r:.80}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r:.80}")
        if self.split == "train" and not (self.captions and all(map(str.strip, self.captions))):
            raise ValueError("a video for training needs captions, and none of them blank")
        for name, time in (("start", self.start), ("end", self.end)):
            if time is not None and not _is_time(time):
                raise ValueError(f"{name} must be in seconds, 0 or more, got {time!r:.80}")
        if self.end is not None and not self.end > (self.start or 0):
            raise ValueError(f"end must be more than start, {self.start or 0}, got {self.end}")


@dataclass(frozen=True)
class Manifest:
    """The videos of a manifest, in the order of its lines, and the folder that holds them."""

    videos: tuple[Video, ...]
    root: Path

    def of_split(self, split: str) -> list[Video]:
        """The videos of one split; raises ValueError if it has none."""
        chosen = [video for video in self.videos if video.split == split]
        if not chosen:
            held = [name for name in SPLITS if any(video.split == name for video in self.videos)]
            raise ValueError(
                f"split is {split!r}, of which the manifest has no video; "
                f"it has {', '.join(held) or 'none at all'}"
            )
        return chosen

    def path_of(self, video: Video) -> Path:
        """Where a video's file or folder is."""
        return self.root / video.video


def read_manifest(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None
) -> Manifest:
    """Read a manifest, whose videos lie under ``root``, by default the folder of the file.

    A UTF-8 byte-order mark, CRLF and blank lines are accepted. Raises ValueError that names file
    and line where a line is no JSON object, lacks a field, has one that cannot be or repeats a
    ``video_id``; OSError if the file cannot be read.
    """
    path = Path(path)
    videos: list[Video] = []
    lines: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                video = _parse(line)
                first = lines.setdefault(video.video_id, number)
                if first != number:
                    raise ValueError(f"video_id {video.video_id!r} stands in line {first} already")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            videos.append(video)
    return Manifest(tuple(videos), path.parent if root is None else Path(root))


def write_manifest(path: str | os.PathLike[str], videos: Iterable[Video]) -> Path:
    """Write a manifest whole or not at all, and return its path.

    Raises ValueError if a ``video_id`` comes twice, OSError if it cannot be written.
    """
    path = Path(path)
    lines: dict[str, str] = {}
    for video in videos:
        if video.video_id in lines:
            raise ValueError(f"{path}: video_id {video.video_id!r} comes twice")
        fields = {name: value for name, value in asdict(video).items() if value is not None}
        lines[video.video_id] = json.dumps(fields, ensure_ascii=False) + "\n"
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines.values())
    unfinished.replace(path)
    return path


def missing(manifest: Manifest, split: str) -> list[Video]:
    """The videos of a split that are not where it says; raises ValueError as `of_split` does."""
    return [video for video in manifest.of_split(split) if not manifest.path_of(video).exists()]


def _parse(line: bytes) -> Video:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("is not in UTF-8; convert the file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, got {record!r:.80}")
    absent = [name for name in ("video", "video_id", "captions", "split") if name not in record]
    if absent:
        raise ValueError(f"lacks {', '.join(absent)}")
    captions = record["captions"]
    return Video(
        video=record["video"],
        video_id=record["video_id"],
        captions=tuple(captions) if isinstance(captions, list) else captions,
        split=record["split"],
        start=record.get("start"),
        end=record.get("end"),
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and _UNFIT.search(value) is None


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value < math.inf
