"""Files that are either there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a file is written into one OSError that names it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # PyTorch's writer reports a full disk as a RuntimeError about positions.
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"{path} could not be written: {reason}") from error


def sync_folder(folder: Path) -> None:
    """Has names that were created or changed in a folder outlive a power failure."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Writes a text file, in UTF-8, as `replace_bytes` does."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, then renames it; OSError names the file."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)
