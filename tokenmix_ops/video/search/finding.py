"""Finds the videos in a folder: files by extension, and folders of numbered images."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tokenmix_ops.video.data.suffixes import is_folder, is_image_name, is_video_name


class Found(NamedTuple):
    """A video: its path relative to the folder, with slashes, and what reveals a change.

    For a folder of images, ``size`` is the total and ``mtime_ns`` the latest. ``problem`` says why
    the video is inaccessible, if it is.
    """

    video: str
    size: int
    mtime_ns: int
    problem: str | None = None


def find_videos(folder: Path, index: Path) -> list[Found]:
    """List the videos in and below a folder by path, except hidden ones and the index.

    A subfolder is itself a video if it holds numbered images and neither folders nor video files.

    Follows links, but enters no folder twice and no parent of ``folder``. A subfolder that cannot
    be listed appears as a video with a problem. Raises ValueError if ``folder`` is not a folder,
    OSError if it cannot be listed.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: pass a folder of videos")
    root = folder.resolve()
    seen = {_identity(parent) for parent in root.parents}
    if index.is_dir():
        seen.add(_identity(index))
    return sorted(_below(root, "", seen))


def _below(folder: Path, name: str, seen: set[tuple[int, int]]) -> Iterator[Found]:
    """Yield the videos of a folder; ``name`` is its path relative to the top, "" for the top."""
    seen.add(_identity(folder))
    try:
        with os.scandir(folder) as listing:
            entries = sorted((e for e in listing if not e.name.startswith(".")), key=_name)
    except OSError as error:
        if not name:
            raise OSError(f"{folder} cannot be listed: {error.strerror}") from error
        yield Found(name, 0, 0, f"cannot be listed: {error.strerror}")
        return
    images = [entry for entry in entries if _is_image(entry)]
    if name and images and not any(is_folder(e) or is_video_name(e.name) for e in entries):
        yield from _looked_at(name, partial(_of_images, folder, name, images))
        return
    for entry in entries:
        path = f"{name}/{entry.name}" if name else entry.name
        if is_folder(entry):
            if _identity(Path(entry.path)) not in seen:
                yield from _below(Path(entry.path), path, seen)
        elif is_video_name(entry.name):
            yield from _looked_at(path, partial(_of_file, entry, path))


def _looked_at(name: str, look: Callable[[], Found]) -> list[Found]:
    """Return the video, one with a problem if it is inaccessible, or nothing if it is gone."""
    try:
        return [look()]
    except FileNotFoundError:
        return []
    except OSError as error:
        return [Found(name, 0, 0, f"cannot be accessed: {error.strerror}")]


def _of_file(entry: os.DirEntry[str], path: str) -> Found:
    status = _status(entry)
    return Found(path, status.st_size, status.st_mtime_ns)


def _of_images(folder: Path, name: str, entries: list[os.DirEntry[str]]) -> Found:
    statuses = [_status(entry) for entry in entries]
    # The folder's own mtime reveals removed and renamed images.
    latest = max([folder.stat().st_mtime_ns, *(status.st_mtime_ns for status in statuses)])
    return Found(name, sum(status.st_size for status in statuses), latest)


def _is_image(entry: os.DirEntry[str]) -> bool:
    stem = os.path.splitext(entry.name)[0]
    return is_image_name(entry.name) and re.search("[0-9]", stem) is not None


def _status(entry: os.DirEntry[str]) -> os.stat_result:
    """Stat a link's target, or the link itself if it is broken."""
    try:
        return entry.stat()
    except OSError:
        return entry.stat(follow_symlinks=False)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name
