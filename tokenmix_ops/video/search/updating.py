"""Brings the index of a folder up to date with the videos in it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from tokenmix_ops.video.data.suffixes import VIDEO_SUFFIXES
from tokenmix_ops.video.engine.interrupts import Interrupts
from tokenmix_ops.video.retrieval.ranking import Track
from tokenmix_ops.video.search.finding import Found, find_videos
from tokenmix_ops.video.search.index import DamagedIndex, Entry, Index, IndexFiles
from tokenmix_ops.video.search.locking import locked
from tokenmix_ops.video.search.model import SearchModel

Item = TypeVar("Item")

DEFAULT_INDEX = ".tokenmix-search"

VIDEOS_IN_A_PART = 32
SECONDS_OF_A_PART = 20.0


def untracked(items: Iterable[Item], _: str) -> Iterable[Item]:
    """Shows nothing."""
    return items


def update_index(
    model: SearchModel,
    folder: str | os.PathLike[str],
    index: str | os.PathLike[str] | None = None,
    *,
    workers: int = 2,
    rebuild: bool = False,
    track: Track = untracked,
    say: Callable[[str], object] = lambda text: None,
) -> Index:
    """The index of a folder after new and changed videos were embedded and deleted ones left out.

    A video has changed if its size or its time of modification has; one that could not be read is
    tried again only then. What is done is kept every few videos: a process that is killed at any
    moment, or interrupted, is followed by one that goes on, and in the end the files are those of a
    single run. While nothing has changed, nothing is written or locked.

    Args:
        model: what embeds.
        folder: holds the videos.
        index: folder for the index; ``.tokenmix-search`` in ``folder`` if None.
        workers: processes that read videos.
        rebuild: leave an earlier index aside, whatever it is.
        track: is given the clips as they come, to show how many there are.
        say: is given sentences about what was found or done.

    Raises ValueError if there are no videos, or for an index that is damaged, of another model, of
    other settings or of another folder; RuntimeError if another process is indexing; OSError if the
    index cannot be written; KeyboardInterrupt after Ctrl-C, with what was done kept.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}, it must be at least 0")
    folder = Path(folder)
    home = folder / DEFAULT_INDEX if index is None else Path(index)
    found = find_videos(folder, home)
    if not found:
        raise ValueError(
            f"{folder} has no videos: neither files ending in {', '.join(VIDEO_SUFFIXES)}, "
            "nor folders of numbered images"
        )
    files = IndexFiles(home, model.settings)
    entries = None if rebuild else _finished(files, found)
    if entries is None:
        with locked(home, folder):
            if rebuild:
                files.remove()
            files.recover()
            earlier = files.read() | files.read_parts()
            # In the folder itself it can be of no other.
            if index is not None and earlier and not any(one.video in earlier for one in found):
                raise ValueError(
                    f"{home} is an index of other videos, {len(earlier)}, than are in {folder}: "
                    "choose another folder with --index, or make it anew with --rebuild"
                )
            entries = _updated(files, earlier, found, model, folder, workers, track, say)
    return Index(folder, tuple(entries[name] for name in sorted(entries)))


def _finished(files: IndexFiles, found: Sequence[Found]) -> dict[str, Entry] | None:
    """The index, if it is up to date."""
    if files.parts.exists():
        return None
    try:
        entries = files.read()
    except DamagedIndex:
        # Another process may be exchanging the files now: the lock will tell.
        return None
    same = len(entries) == len(found) and all(_unchanged(one, entries) for one in found)
    return entries if same else None


def _updated(
    files: IndexFiles,
    earlier: dict[str, Entry],
    found: Sequence[Found],
    model: SearchModel,
    folder: Path,
    workers: int,
    track: Track,
    say: Callable[[str], object],
) -> dict[str, Entry]:
    kept = {one.video: earlier[one.video] for one in found if _unchanged(one, earlier)}
    pending = [one for one in found if one.video not in kept]
    if kept and pending:
        say(f"{len(kept)} of {len(found)} videos are indexed already")
    done = 0
    with Interrupts() as interrupts:
        for part in _parts(_embedded(model, folder, pending, workers, track), interrupts):
            files.write_part(part)
            kept |= {entry.video: entry for entry in part}
            done += len(part)
        if done < len(pending):
            say(
                f"stopped: {len(kept)} of {len(found)} videos are indexed; the same command goes "
                "on from there"
            )
            raise KeyboardInterrupt
        files.write(kept.values())
        if interrupts.requested:
            raise KeyboardInterrupt
    return kept


def _parts(entries: Generator[Entry, None, None], interrupts: Interrupts) -> Iterator[list[Entry]]:
    """Entries in parts, the last one when they end or a signal came."""
    part: list[Entry] = []
    began = time.monotonic()
    with closing(entries):
        while not interrupts.requested and (entry := next(entries, None)) is not None:
            part.append(entry)
            if len(part) == VIDEOS_IN_A_PART or time.monotonic() - began > SECONDS_OF_A_PART:
                yield part
                part, began = [], time.monotonic()
    if part:
        yield part


def _embedded(
    model: SearchModel, folder: Path, pending: Sequence[Found], workers: int, track: Track
) -> Generator[Entry, None, None]:
    """An entry of each video in order."""
    listed = [one for one in pending if one.problem is None]
    for one in pending:
        if one.problem is not None:
            yield Entry(one.video, one.size, one.mtime_ns, error=one.problem)
    if not listed:
        return
    paths = [folder / one.video for one in listed]
    clips = track(model.read(paths, workers), "indexing")
    for one, clip in zip(listed, clips, strict=True):
        if clip.pixels is None:
            yield Entry(one.video, one.size, one.mtime_ns, error=clip.error)
            continue
        embedding = model.embed_video(clip.pixels)
        if not embedding.isfinite().all():
            raise RuntimeError(
                f"{folder / one.video} has an embedding that is not finite: try another --precision"
            )
        yield Entry(one.video, one.size, one.mtime_ns, clip.duration, embedding=embedding)


def _unchanged(one: Found, entries: dict[str, Entry]) -> bool:
    entry = entries.get(one.video)
    return entry is not None and (entry.size, entry.mtime_ns) == (one.size, one.mtime_ns)
