"""Updates the index of a folder to match its videos."""

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
    """Show no progress."""
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
    """Embed new and changed videos, drop deleted ones, and return the index.

    A video has changed if its size or modification time has; an unreadable video is retried only
    then. Progress is saved every few videos: after a kill or an interrupt the next run resumes, and
    the final files equal those of a single run. If nothing has changed, it writes and locks
    nothing.

    Args:
        model: the model that embeds.
        folder: the folder of videos.
        index: folder for the index; ``.tokenmix-search`` in ``folder`` if None.
        workers: number of processes that read videos.
        rebuild: discard any earlier index.
        track: wraps the clips to show progress.
        say: receives status messages.

    Raises ValueError if there are no videos, or if the index is damaged or was made with another
    model, other settings or another folder; RuntimeError if another process is indexing; OSError if
    the index cannot be written; KeyboardInterrupt after Ctrl-C, with progress saved.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    folder = Path(folder)
    home = folder / DEFAULT_INDEX if index is None else Path(index)
    found = find_videos(folder, home)
    if not found:
        raise ValueError(
            f"expected videos in {folder}, got none: neither files ending in "
            f"{', '.join(VIDEO_SUFFIXES)}, nor folders of numbered images"
        )
    files = IndexFiles(home, model.settings)
    entries = None if rebuild else _finished(files, found)
    if entries is None:
        with locked(home, folder):
            if rebuild:
                files.remove()
            files.recover()
            earlier = files.read() | files.read_parts()
            # The default index lies in the folder itself and cannot belong to another.
            if index is not None and earlier and not any(one.video in earlier for one in found):
                raise ValueError(
                    f"{home} indexes {len(earlier)} videos, none of which is in {folder}: "
                    "choose another folder with --index, or rebuild it with --rebuild"
                )
            entries = _updated(files, earlier, found, model, folder, workers, track, say)
    return Index(folder, tuple(entries[name] for name in sorted(entries)))


def _finished(files: IndexFiles, found: Sequence[Found]) -> dict[str, Entry] | None:
    """Return the entries if the index is up to date, else None."""
    if files.parts.exists():
        return None
    try:
        entries = files.read()
    except DamagedIndex:
        # Another process may be exchanging the files; taking the lock will show.
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
        say(f"{len(kept)} of {len(found)} videos are already indexed")
    done = 0
    with Interrupts() as interrupts:
        for part in _parts(_embedded(model, folder, pending, workers, track), interrupts):
            files.write_part(part)
            kept |= {entry.video: entry for entry in part}
            done += len(part)
        if done < len(pending):
            say(
                f"stopped: {len(kept)} of {len(found)} videos are indexed; run the same command to "
                "resume"
            )
            raise KeyboardInterrupt
        files.write(kept.values())
        if interrupts.requested:
            raise KeyboardInterrupt
    return kept


def _parts(entries: Generator[Entry, None, None], interrupts: Interrupts) -> Iterator[list[Entry]]:
    """Group entries into parts; the last part ends with the entries or at a signal."""
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
    """Yield an entry for each video in order."""
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
                f"{folder / one.video} has a non-finite embedding: try another --precision"
            )
        yield Entry(one.video, one.size, one.mtime_ns, clip.duration, embedding=embedding)


def _unchanged(one: Found, entries: dict[str, Entry]) -> bool:
    entry = entries.get(one.video)
    return entry is not None and (entry.size, entry.mtime_ns) == (one.size, one.mtime_ns)
