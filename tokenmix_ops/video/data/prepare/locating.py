"""Where the video of an id lies: a file, or a folder of numbered images, below one folder."""

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

    Of several by one name, the first is that which lies least deep, a file before a folder, then
    by the alphabet.
    """

    files: dict[str, list[str]]
    """Paths relative to the folder, with "/"."""
    folders: frozenset[str]
    """Those of them that are folders of images."""

    def find(self, name: str) -> str | None:
        """The first of `paths`; None if there is none."""
        return next(iter(self.paths(name)), None)

    def paths(self, name: str) -> list[str]:
        """Where a video is, by its name or, with "/", by its path, either without suffix."""
        return (self._by_path if "/" in name else self.files).get(name, [])

    def numbered(self, number: int) -> list[str]:
        """Names of the videos that have this number: "video12" for 12.

        These are none unless all names whose only digits are at the end begin alike.
        """
        return self._numbers.get(number, []) if len(self.beginnings) == 1 else []

    @cached_property
    def beginnings(self) -> list[str]:
        """What stands before the number in names whose only digits are at the end."""
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
    """Look through a folder and all below it; what is hidden is passed over.

    A folder that holds images, and neither videos nor folders, is a video, unless it is ``folder``
    itself. ``progress`` is called with the number of videos found so far. Raises OSError where a
    folder cannot be read.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; it should be that of the videos")
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
    """(depth, whether it is a folder, path) of each video."""
    # Links may lead in circles, and to one place twice.
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
        # Backwards, so that what is linked twice is found by the first name.
        stack.extend(sorted(folders, reverse=True))


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
