"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Reports an error while a file is written as an OSError that names it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # PyTorch's writer reports a full disk as a RuntimeError about positions.
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"{path} could not be written: {reason}") from error


def sync_folder(folder: Path) -> None:
    """Makes names that were created or changed in a folder outlive a power failure."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path to write to, which becomes ``path`` when the block succeeds.

    ``durable``: the file outlives a power failure from then on. Raises OSError that names ``path``
    if it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            yield part
            if durable:
                with part.open("rb") as file:
                    os.fsync(file.fileno())
            part.replace(path)
            if durable:
                sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to write into, which becomes ``folder`` when the block succeeds.

    Raises OSError if ``folder`` is a file or is not empty.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        # In a folder of its own, which has the usual permissions.
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        yield unfinished
        if folder.exists():
            folder.rmdir()
        unfinished.replace(folder)


def replace_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all; OSError names it."""
    with replacing(path) as part:
        part.write_bytes(data)
