"""An index on disk: ``embeddings.safetensors``, ``videos.jsonl``, and parts of an unfinished one.

The two files change together: the first holds a digest of the second, which waits under a temporary
name until the first is in place. Indexing saves its progress in parts, each written atomically, and
joins them at the end. An index's contents do not depend on when, or in how many runs, it was made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokenmix_ops.video.files import replace_bytes, replace_text, sync_folder

FORMAT = "tokenmix_ops.search/1"

EMBEDDINGS, VIDEOS, PARTS, LOCK = "embeddings.safetensors", "videos.jsonl", "parts", "lock"
_NEXT_VIDEOS = "videos.next.jsonl"

_ADVICE = "rebuild it with --rebuild, or choose another folder with --index"


class DamagedIndex(ValueError):
    """A file of an index was damaged after it was written."""


@dataclass(frozen=True)
class Entry:
    """A video in an index: its path relative to the folder, and its embedding or error.

    ``size`` in bytes and ``mtime_ns`` describe the file that was read; ``duration`` in seconds,
    None if unknown; ``embedding`` float32 [dim], a unit vector.
    """

    video: str
    size: int
    mtime_ns: int
    duration: float | None = None
    error: str | None = None
    embedding: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Index:
    """The indexed videos of a folder, by path."""

    folder: Path
    entries: tuple[Entry, ...]

    @property
    def readable(self) -> list[Entry]:
        """Entries with an embedding."""
        return [entry for entry in self.entries if entry.embedding is not None]

    @property
    def unreadable(self) -> list[Entry]:
        """Entries with an error."""
        return [entry for entry in self.entries if entry.error is not None]

    def path_of(self, entry: Entry) -> Path:
        """Return the path of a video's file or folder."""
        return self.folder / entry.video


class IndexFiles:
    """The files of one index.

    Args:
        folder: the folder of the index.
        settings: what embeddings depend on; an index with other settings is refused.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, dict(settings)
        self.embeddings, self.videos = folder / EMBEDDINGS, folder / VIDEOS
        self.next_videos, self.parts = folder / _NEXT_VIDEOS, folder / PARTS

    def part_files(self) -> list[Path]:
        """Parts in the order they were written."""
        return sorted(self.parts.glob("*.safetensors"))

    def read(self) -> dict[str, Entry]:
        """Read the entries by path, without parts; empty if there is no index.

        Raises DamagedIndex for damaged files, ValueError for an index with other settings.
        """
        if not self.embeddings.exists():
            if self.videos.exists():
                raise DamagedIndex(f"{self.folder} has {VIDEOS} but no {EMBEDDINGS}: {_ADVICE}")
            return {}
        about, embeddings = self._read(self.embeddings)
        try:
            text = self.videos.read_bytes()
        except OSError as error:
            raise DamagedIndex(
                f"{self.videos} cannot be read ({error.strerror}): {_ADVICE}"
            ) from error
        if _digest(text) != about["videos"]:
            raise DamagedIndex(f"{self.videos} is damaged: {_ADVICE}")
        return _entries(text.decode(), embeddings)

    def read_parts(self) -> dict[str, Entry]:
        """Read the entries of all parts by path, the latest of each; raises as `read` does."""
        found: dict[str, Entry] = {}
        for path in self.part_files():
            about, embeddings = self._read(path)
            found |= _entries(about["lines"], embeddings)
        return found

    def recover(self) -> None:
        """Complete or undo what a killed process left unfinished. Requires the lock."""
        for unfinished in (*self.folder.glob("*.part"), *self.parts.glob("*.part")):
            unfinished.unlink()
        if self.next_videos.exists() and self.embeddings.exists():
            about, _ = self._read(self.embeddings)
            if _digest(self.next_videos.read_bytes()) == about["videos"]:
                self._exchange_videos()
        self.next_videos.unlink(missing_ok=True)

    def write_part(self, entries: Iterable[Entry]) -> None:
        """Save entries as a part until `write`."""
        self.parts.mkdir(exist_ok=True)
        names = [path.stem for path in self.part_files()]
        number = int(names[-1]) + 1 if names else 0
        text, embeddings = _lines(entries)
        self._write(self.parts / f"{number:08d}.safetensors", embeddings, lines=text)

    def write(self, entries: Iterable[Entry]) -> None:
        """Replace the earlier index and its parts."""
        text, embeddings = _lines(sorted(entries, key=lambda entry: entry.video))
        replace_text(self.next_videos, text)
        self._write(self.embeddings, embeddings, videos=_digest(text.encode()))
        self._exchange_videos()
        self._remove_parts()

    def remove(self) -> None:
        """Remove the index and its parts."""
        self._remove_parts()
        for path in (self.next_videos, self.videos, self.embeddings):
            path.unlink(missing_ok=True)

    def _exchange_videos(self) -> None:
        self.next_videos.replace(self.videos)
        sync_folder(self.folder)

    def _remove_parts(self) -> None:
        if self.parts.exists():
            # Remove the latest part last, because it overrides the others.
            for path in sorted(self.parts.glob("*.safetensors*")):
                path.unlink()
            self.parts.rmdir()

    def _write(self, path: Path, embeddings: Tensor, **about: str) -> None:
        description = {
            "format": FORMAT,
            "settings": self.settings,
            "embeddings": _digest(embeddings.numpy().tobytes()),
            **about,
        }
        # Use one key: safetensors does not guarantee the order of several.
        data = save({"embeddings": embeddings}, {"index": json.dumps(description, sort_keys=True)})
        replace_bytes(path, data)

    def _read(self, path: Path) -> tuple[dict[str, Any], Tensor]:
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["index"])
                embeddings = file.get_tensor("embeddings")
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']!r}")
            if _digest(embeddings.numpy().tobytes()) != about["embeddings"]:
                raise ValueError("the embeddings' checksum is wrong")
            settings: dict[str, Any] = about["settings"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DamagedIndex(f"{path} is damaged ({error}): {_ADVICE}") from error
        differing = [
            f"{name}={settings.get(name)} instead of {value}"
            for name, value in self.settings.items()
            if settings.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{self.folder} was made with another model or other settings "
                f"({', '.join(differing)}): choose another folder with --index, or rebuild it with "
                "--rebuild"
            )
        return about, embeddings


def _lines(entries: Iterable[Entry]) -> tuple[str, Tensor]:
    """Return the entries as JSON lines, and their embeddings [n, dim] in the same order."""
    lines: list[str] = []
    rows: list[Tensor] = []
    for entry in entries:
        line = {"video": entry.video, "size": entry.size, "mtime_ns": entry.mtime_ns}
        if entry.embedding is None:
            lines.append(json.dumps({**line, "error": entry.error}))
        else:
            lines.append(json.dumps({**line, "duration": entry.duration, "row": len(rows)}))
            rows.append(entry.embedding)
    embeddings = torch.stack(rows) if rows else torch.zeros(0, 0)
    return "".join(line + "\n" for line in lines), embeddings


def _entries(text: str, embeddings: Tensor) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for line in text.splitlines():
        values = json.loads(line)
        row = values.pop("row", None)
        entry = Entry(**values)
        entries[entry.video] = entry if row is None else replace(entry, embedding=embeddings[row])
    return entries


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
