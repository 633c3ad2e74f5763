"""Finds the file, or folder of numbered images, of a video id below one folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenmix_ops.video.data.manifest import is_text
from tokenmix_ops.video.data.suffixes import is_folder, is_image_name, is_video_name

_NUMBERED = re.compile("([^0-9]*)([0-9]+)")


@dataclass(frozen=True)
class Library:
    """The videos below a folder, by name without suffix.

    Videos with the same name are ordered by depth, then files before folders, then alphabetically.
    """

    files: dict[str, list[str]]
    """Paths relative to the folder, with "/"."""
    folders: frozenset[str]
    """The paths that are folders of images."""

    def find(self, name: str) -> str | None:
        """Return the first of `paths`, or None."""
        return next(iter(self.paths(name)), None)

    def paths(self, name: str) -> list[str]:
        """Return a video's paths by name or, with "/", by path, both without suffix."""
        return (self._by_path if "/" in name else self.files).get(name, [])

    def numbered(self, number: int) -> list[str]:
        """Return the names of the videos with this number: "video12" for 12.

        Returns none unless all names with digits only at the end share one prefix.
        """
        return self._numbers.get(number, []) if len(self.beginnings) == 1 else []

    @cached_property
    def beginnings(self) -> list[str]:
        """The prefixes of names with digits only at the end."""
        return sorted({parts[1] for name in self.files if (parts := _NUMBERED.fullmatch(name))})

    @cached_property
    def _numbers(self) -> dict[int, list[str]]:
        numbers: dict[int, list[str]] = {}
        for name in self.files:
            if parts := _NUMBERED.fullmatch(name):
                numbers.setdefault(int(parts[2]), []).append(name)
        return numbers

    @cached_property
    def _by_path(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in (path for paths in self.files.values() for path in paths):
            stem = path if path in self.folders else os.path.splitext(path)[0]
            found.setdefault(stem, []).append(path)
        return found


def scan(folder: Path, progress: Callable[[int], object] | None = None) -> Library:
    """Scan a folder recursively, skipping hidden entries.

    A subfolder with images and neither videos nor folders is a video. Calls ``progress`` with the
    number of videos found so far. Raises OSError if a folder cannot be read.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder: pass the folder of videos")
    found: list[tuple[int, bool, str]] = []
    for depth, of_images, path in _videos(folder):
        found.append((depth, of_images, path))
        if progress is not None and len(found) % 1000 == 0:
            progress(len(found))
    files: dict[str, list[str]] = {}
    for _, of_images, path in sorted(found):
        name = path.rpartition("/")[2]
        files.setdefault(name if of_images else os.path.splitext(name)[0], []).append(path)
    return Library(files, frozenset(path for _, of_images, path in found if of_images))


def _videos(root: Path) -> Iterator[tuple[int, bool, str]]:
    """Yield (depth, whether it is a folder, path) for each video."""
    # Links may form cycles, or lead to one folder twice.
    seen: set[tuple[int, int]] = set()
    stack: list[tuple[int, str]] = [(0, "")]
    while stack:
        depth, below = stack.pop()
        status = os.stat(root / below)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, has_images, has_videos = [], False, False
        with os.scandir(root / below) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not is_text(entry.name):
                    continue
                path = f"{below}/{entry.name}" if below else entry.name
                if is_folder(entry):
                    folders.append((depth + 1, path))
                elif is_image_name(entry.name):
                    has_images = True
                elif is_video_name(entry.name) and _is_file(entry):
                    has_videos = True
                    yield depth, False, path
        if has_images and below and not (has_videos or folders):
            yield depth - 1, True, below
        # Push in reverse, so that a folder linked twice is found under its first name.
        stack.extend(sorted(folders, reverse=True))


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
