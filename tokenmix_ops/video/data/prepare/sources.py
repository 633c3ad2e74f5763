"""Finds a data set's annotation files among the files and folders that a user names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """What is to be read, and for what."""

    task: str
    training_list: str
    found: Mapping[str, Path]
    """Files by the names that the data set's files are known by."""
    others: Sequence[Path] = ()
    """Files of other names that the data set takes as well."""
    splits: Mapping[str, Path] = field(default_factory=dict)
    """Files that the user named for a split."""

    def need(self, *names: str) -> Path:
        """The first of these files that is there; raises ValueError if none is."""
        for name in names:
            if name in self.found:
                return self.found[name]
        had = ", ".join([*self.found, *map(str, self.others)])
        raise ValueError(
            f"annotations lack {' or '.join(names)}"
            f"{f', there is {had}' if had else ''}: name the file, or its folder"
        )


def find_files(
    annotations: Sequence[Path], known: Sequence[str], others: str
) -> tuple[dict[str, Path], list[Path]]:
    """Known files by name, and files that end in ``others``, "" for none.

    A folder is searched for the known names, two levels deep; a file named outright comes before
    one that is found so. Raises ValueError if one is there twice, none is there at all, or a file
    is not known; OSError for a path that is not there.
    """
    named: dict[str, list[Path]] = {}
    met: dict[str, list[Path]] = {}
    rest: list[Path] = []
    for path in annotations:
        if path.is_dir():
            for hit in _walk(path, 2):
                if hit.name in known:
                    met.setdefault(hit.name, []).append(hit)
        elif not path.exists():
            raise FileNotFoundError(f"{path} is not there")
        elif path.name in known:
            named.setdefault(path.name, []).append(path)
        elif others and path.name.endswith(others):
            rest.append(path)
        else:
            raise ValueError(f"{path} is not known by its name, one of {', '.join(known)}")
    found: dict[str, Path] = {}
    for name, (first, *more) in (met | named).items():
        for other in more:
            if not first.samefile(other):
                raise ValueError(f"{name} is there twice, {first} and {other}: name one of them")
        found[name] = first
    if not (found or rest):
        given = ", ".join(map(str, annotations)) or "no file or folder"
        raise ValueError(f"none of {', '.join(known)} is in {given}")
    return found, rest


def _walk(folder: Path, depth: int) -> list[Path]:
    files: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_file():
                files.append(Path(entry.path))
            elif depth > 1 and entry.is_dir():
                files.extend(_walk(Path(entry.path), depth - 1))
    return files
