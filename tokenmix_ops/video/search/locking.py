"""Locks an index, so that only one process at a time changes it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenmix_ops.video.search.index import LOCK


@contextmanager
def locked(folder: Path, videos: Path) -> Iterator[None]:
    """Create the folder of an index and lock it until the context or the process ends.

    ``videos`` is the indexed folder, for messages. Raises ValueError if the folder holds other
    files, RuntimeError if another process holds the lock, OSError if it cannot be written.
    """
    lock = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # An index's first file is its lock.
        if any(folder.iterdir()) and not lock.exists():
            raise ValueError(
                f"{folder} holds files but no index: choose an empty or new folder with --index"
            )
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OSError(
            f"the index of {videos} cannot be written in {folder} ({error.strerror}): choose "
            "another folder with --index"
        ) from error
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"another process is indexing {videos} in {folder}: wait for it, or choose another "
                "folder with --index"
            ) from error
        yield
    finally:
        _held.discard(descriptor)
        # Closing also unlocks it.
        os.close(descriptor)


_held: set[int] = set()


def _let_go() -> None:
    """Close locks in a forked child, or readers would hold them after the indexer is killed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)
