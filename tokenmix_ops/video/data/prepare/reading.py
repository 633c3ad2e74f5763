"""Reads third-party text, JSON and CSV files; errors name the file and the place in it."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from tokenmix_ops.video.data.manifest import is_text, is_time
from tokenmix_ops.video.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES

# In bytes: the limits of common file systems, less a suffix and the parent folders.
_LONGEST = 250
_LONGEST_PATH = 1000
_CONTROL = re.compile("[\0-\x1f\x7f]")
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Record:
    """An object in a JSON file; reading a field of the wrong type raises ValueError."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: must be an object, got {shown(value)}")
        self.fields: dict[str, Any] = value
        self.where = where

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def get(self, name: str) -> Any:
        """Return a field of any type."""
        if name not in self.fields:
            raise ValueError(f"{self.where}: lacks {name!r} (fields: {_names(self.fields)})")
        return self.fields[name]

    def text(self, name: str) -> str:
        """Return a string."""
        value = self.get(name)
        if not is_text(value):
            raise self._wrong(name, "a string", value)
        return value

    def texts(self, name: str) -> list[str]:
        """Return a list of strings."""
        values = self.get(name)
        if not (isinstance(values, list) and all(map(is_text, values))):
            raise self._wrong(name, "a list of strings", values)
        return values

    def seconds(self, name: str) -> float:
        """Return a time of at least 0."""
        value = self.get(name)
        if not is_time(value):
            raise self._wrong(name, "at least 0 seconds", value)
        return float(value)

    def records(self, name: str) -> Iterator[Record]:
        """Return the objects of a list."""
        values = self.get(name)
        if not isinstance(values, list):
            raise self._wrong(name, "a list", values)
        return (Record(value, f"{self.where}, {name}[{i}]") for i, value in enumerate(values))

    def _wrong(self, name: str, wanted: str, value: object) -> ValueError:
        return ValueError(f"{self.where}: {name!r} must be {wanted}, got {shown(value)}")


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte-order mark; raise ValueError if it is empty."""
    content = path.read_bytes()
    if content.startswith(_WIDE):
        raise ValueError(f"{path} is UTF-16; convert it to UTF-8")
    content = content.removeprefix(codecs.BOM_UTF8)
    if not content.strip():
        raise ValueError(f"{path} is empty")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: is not UTF-8 (byte 0x{content[error.start]:02x}); "
            "convert the file"
        ) from error


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each non-blank line with its place: ("FILE, line 3", line)."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if "\0" in line:
            raise ValueError(f"{path}, line {number}: expected text, got a NUL character")
        if line.strip():
            yield f"{path}, line {number}", line.removesuffix("\r")


def read_json(path: Path) -> Any:
    """Parse a JSON file."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: is not JSON: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply") from error


def read_records(path: Path) -> Iterator[Record]:
    """Read the objects of a JSON file that holds a list of them."""
    values = read_json(path)
    if not isinstance(values, list):
        raise ValueError(f"{path}: must hold a list, got {shown(values)}")
    return (Record(value, f"{path}, [{i}]") for i, value in enumerate(values))


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the named columns of each row of a CSV file with a header."""
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        absent = [name for name in columns if name not in (rows.fieldnames or ())]
        if absent:
            raise ValueError(
                f"{path}, line 1: lacks the column {', '.join(absent)} "
                f"(columns: {_names(rows.fieldnames or ())})"
            )
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            # DictReader stores surplus columns under None.
            if None in row:
                wide, header = len(row) - 1 + len(row[None]), len(rows.fieldnames or ())
                raise ValueError(
                    f"{where}: expected {header} columns as in the header, got {wide}: "
                    "quote text that contains a comma"
                )
            short = [name for name in columns if row[name] is None]
            if short:
                raise ValueError(f"{where}: lacks {', '.join(short)}")
            if any("\0" in row[name] for name in columns):
                raise ValueError(f"{where}: expected text, got a NUL character")
            yield where, {name: row[name] for name in columns}
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.reader.line_num}: is not CSV: {error}") from error


def video_name(text: str, where: str) -> str:
    """Validate a video id from a file, and strip a video suffix.

    Raises ValueError if no file could have that name, or if it could leave the videos' folder.
    """
    name = _stem(text.strip(), VIDEO_SUFFIXES)
    _check_name(name, text, where)
    if "/" in name or "\\" in name:
        raise ValueError(f"{where}: expected a video name without folders, got {text!r:.80}")
    return name


def video_path(text: str, where: str) -> str:
    """Like `video_name`, but allows folders, separated by "/".

    Also strips an image suffix, because an image list may name what is a video here.
    """
    *folders, name = text.strip().split("/")
    if "\\" in text or ".." in folders or folders[:1] == [""]:
        raise ValueError(
            f"{where}: expected a path in the videos' folder, with '/' and without '..', got "
            f"{text!r:.80}"
        )
    parts = [folder for folder in folders if folder not in ("", ".")]
    parts.append(_stem(name, (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)))
    for part in parts:
        _check_name(part, text, where)
    path = "/".join(parts)
    if len(path.encode()) > _LONGEST_PATH:
        raise ValueError(f"{where}: {text!r:.80} is too long for a path")
    return path


def _stem(name: str, suffixes: Sequence[str]) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in suffixes else name


def _check_name(name: str, text: str, where: str) -> None:
    if not is_text(name) or name in ("", ".", "..") or _CONTROL.search(name):
        raise ValueError(f"{where}: {text!r:.80} is not a valid video name")
    if len(name.encode()) > _LONGEST:
        raise ValueError(f"{where}: {text!r:.80} is too long for a file name")


def _names(names: Sequence[str] | dict[str, Any]) -> str:
    return f"{', '.join(map(repr, names)):.200}" if names else "none"
