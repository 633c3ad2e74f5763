"""From the official files of a data set, and a folder of its videos, to the one format."""

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
"""Each has FILES, the names its files are known by; OTHERS, how the name of a file may end that it
takes all the same, or ""; ``read(request, listing)``; and ``official(request)``."""

TASKS = ("captioning", "retrieval")


@dataclass(frozen=True)
class SplitCount:
    """What a split holds."""

    split: str
    videos: int
    captions: int
    missing: int
    """Videos that are not in their folder; 0 if they are left out."""
    official: int | None
    """How many videos the official split holds; None where there is none."""


@dataclass(frozen=True)
class Prepared:
    """Videos for `write_manifest`, what they hold by split, and what was wrong with the files."""

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
    """Read a data set's annotations, and find its videos.

    ``dataset`` is one of `DATASETS`. ``annotations`` are its files, or folders that hold them; for
    "lists" it is empty, and ``splits`` names the file of each split. ``root`` is the folder of the
    manifest, from which its paths start. ``task`` and ``training_list`` ("9k" or "7k", the former
    if left out, for retrieval) choose among the splits of MSR-VTT; elsewhere both tasks have the
    same. A video in two splits stays in the test, or else in val, and is no more trained on.
    Missing videos stay, where they are expected, unless ``drop_missing``. ``progress`` is
    called with what is being done, and how many videos are found so far. Raises ValueError, which
    names file and place, for what cannot be read, and with ``strict`` at the first problem; OSError
    for files and folders that are not there.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if training_list not in (None, *msrvtt.TRAINING_LISTS):
        options = ", ".join(msrvtt.TRAINING_LISTS)
        raise ValueError(f"training_list must be one of {options}, got {training_list!r}")
    if training_list is not None and (dataset, task) != ("msrvtt", "retrieval"):
        raise ValueError("training_list is for retrieval on msrvtt alone; leave it out")
    family = DATASETS[dataset]
    if isinstance(annotations, str | os.PathLike):
        annotations = [annotations]
    paths, named = [Path(path) for path in annotations], _by_split(splits or {})
    if dataset == "lists":
        if paths or not named:
            raise ValueError("lists takes a file for each split, train, val or test, and no others")
        found: dict[str, Path] = {}
        others: list[Path] = []
    elif named:
        raise ValueError(f"files by split are for lists; {dataset} knows its files by their names")
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
        raise ValueError(f"no video is left: {summary(listing.problems) or 'none is listed'}")
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
        raise ValueError(f"splits are {', '.join(SPLITS)}, got {', '.join(map(repr, unknown))}")
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
