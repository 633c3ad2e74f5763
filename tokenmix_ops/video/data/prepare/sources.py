"""Finds a data set's annotation files among the files and folders given by the user."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """The files to read, and the task."""

    task: str
    training_list: str
    found: Mapping[str, Path]
    """Files by their official names."""
    others: Sequence[Path] = ()
    """Accepted files with other names."""
    splits: Mapping[str, Path] = field(default_factory=dict)
    """Files that the user gave for each split."""

    def need(self, *names: str) -> Path:
        """Return the first of these files that was found; raise ValueError if none was."""
        for name in names:
            if name in self.found:
                return self.found[name]
        had = ", ".join([*self.found, *map(str, self.others)])
        raise ValueError(
            f"annotations lack {' or '.join(names)}"
            f"{f', got only {had}' if had else ''}: pass the file or its folder"
        )


def find_files(
    annotations: Sequence[Path], known: Sequence[str], others: str
) -> tuple[dict[str, Path], list[Path]]:
    """Return known files by name, and files that end in ``others``, "" for none.

    Searches folders for known names, two levels deep; explicit files take precedence. Raises
    ValueError if a name occurs twice, none is found, or a file is unknown; OSError for a missing
    path.
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
            raise FileNotFoundError(f"{path} does not exist")
        elif path.name in known:
            named.setdefault(path.name, []).append(path)
        elif others and path.name.endswith(others):
            rest.append(path)
        else:
            raise ValueError(f"expected a file named {', '.join(known)}, got {path}")
    found: dict[str, Path] = {}
    for name, (first, *more) in (met | named).items():
        for other in more:
            if not first.samefile(other):
                raise ValueError(f"{name} exists twice, as {first} and {other}: pass one of them")
        found[name] = first
    if not (found or rest):
        given = ", ".join(map(str, annotations)) or "no file or folder"
        raise ValueError(f"expected one of {', '.join(known)}, got {given}")
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
