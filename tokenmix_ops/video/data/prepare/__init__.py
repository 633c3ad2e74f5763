"""Converts a data set's official files and a folder of its videos to a manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tokenmix_ops.video.data.manifest import SPLITS, Problem, Video, summary
from tokenmix_ops.video.data.prepare import lists, lsmdc, msrvtt, msvd, vatex
from tokenmix_ops.video.data.prepare.assembling import assemble
from tokenmix_ops.video.data.prepare.listing import Listing
from tokenmix_ops.video.data.prepare.locating import scan
from tokenmix_ops.video.data.prepare.sources import Request, find_files

DATASETS: dict[str, ModuleType] = {
    "msrvtt": msrvtt,
    "msvd": msvd,
    "vatex": vatex,
    "lsmdc": lsmdc,
    "lists": lists,
}
"""Each module has FILES, the official file names; OTHERS, a suffix of other accepted files, or "";
``read(request, listing)``; and ``official(request)``."""

TASKS = ("captioning", "retrieval")


@dataclass(frozen=True)
class SplitCount:
    """The counts of a split."""

    split: str
    videos: int
    captions: int
    missing: int
    """Videos not found in the folder; 0 if they are dropped."""
    official: int | None
    """Number of videos in the official split; None if there is none."""


@dataclass(frozen=True)
class Prepared:
    """Videos for `write_manifest`, counts by split, and problems in the files."""

    videos: tuple[Video, ...]
    counts: tuple[SplitCount, ...]
    problems: tuple[Problem, ...]


def prepare(
    dataset: str,
    annotations: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    videos: str | os.PathLike[str],
    root: str | os.PathLike[str] = ".",
    *,
    splits: Mapping[str, str | os.PathLike[str]] | None = None,
    task: str = "captioning",
    training_list: str | None = None,
    strict: bool = False,
    drop_missing: bool = False,
    progress: Callable[[str, int], object] | None = None,
) -> Prepared:
    """Read a data set's annotations and find its videos.

    ``dataset`` is one of `DATASETS`. ``annotations`` are its files, or folders that hold them; for
    "lists" it is empty, and ``splits`` names the file of each split. Paths in the manifest are
    relative to ``root``, its folder. ``task`` and, for retrieval, ``training_list`` ("9k", the
    default, or "7k") select MSR-VTT's splits; other data sets have the same splits for both tasks.
    A video in two splits stays in test, else in val. Missing videos keep their expected path unless
    ``drop_missing``. Calls ``progress`` with the current phase and the number of videos found so
    far. Raises ValueError with file and place for unreadable content, and with ``strict`` at the
    first problem; OSError for missing files and folders.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if training_list not in (None, *msrvtt.TRAINING_LISTS):
        options = ", ".join(msrvtt.TRAINING_LISTS)
        raise ValueError(f"training_list must be one of {options}, got {training_list!r}")
    if training_list is not None and (dataset, task) != ("msrvtt", "retrieval"):
        raise ValueError("training_list applies only to retrieval on msrvtt; omit it")
    family = DATASETS[dataset]
    if isinstance(annotations, str | os.PathLike):
        annotations = [annotations]
    paths, named = [Path(path) for path in annotations], _by_split(splits or {})
    if dataset == "lists":
        if paths or not named:
            raise ValueError("lists takes one file per split (train, val, test) and no other files")
        found: dict[str, Path] = {}
        others: list[Path] = []
    elif named:
        raise ValueError(f"files by split are for lists; {dataset} recognises files by name")
    else:
        found, others = find_files(paths, family.FILES, family.OTHERS)
    request = Request(task, training_list or "9k", found, tuple(others), named)
    listing = Listing(strict=strict)
    report = progress or (lambda doing, count: None)
    report("reading annotations", 0)
    family.read(request, listing)
    report("looking for videos", 0)
    library = scan(Path(videos), lambda count: report("looking for videos", count))
    prefix = os.path.relpath(os.path.realpath(videos), os.path.realpath(root))
    kept, absent = assemble(listing, library, prefix.replace(os.sep, "/"))
    if drop_missing:
        kept = [video for video in kept if video.video_id not in absent]
        absent = set()
    if not kept:
        raise ValueError(
            f"expected at least one usable video, got none: "
            f"{summary(listing.problems) or 'none is listed'}"
        )
    official = family.official(request)
    counts = [_count(split, kept, absent, official) for split in SPLITS]
    return Prepared(
        tuple(kept),
        tuple(one for one in counts if one.videos or one.official),
        tuple(listing.problems),
    )


def _by_split(splits: Mapping[str, str | os.PathLike[str]]) -> dict[str, Path]:
    unknown = [split for split in splits if split not in SPLITS]
    if unknown:
        raise ValueError(
            f"splits must be among {', '.join(SPLITS)}, got {', '.join(map(repr, unknown))}"
        )
    return {split: Path(splits[split]) for split in SPLITS if split in splits}


def _count(
    split: str, videos: Sequence[Video], absent: set[str], official: Mapping[str, int]
) -> SplitCount:
    own = [video for video in videos if video.split == split]
    return SplitCount(
        split,
        videos=len(own),
        captions=sum(len(video.captions) for video in own),
        missing=sum(video.video_id in absent for video in own),
        official=official.get(split),
    )
