"""One process at a time may change an index."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenmix_ops.video.search.index import LOCK


@contextmanager
def locked(folder: Path, videos: Path) -> Iterator[None]:
    """Makes the folder of an index and keeps others from changing it, until the end or a kill.

    ``videos`` is what is indexed, for messages. Raises ValueError for a folder that holds other
    files, RuntimeError if another process is at it, and OSError if it cannot be written.
    """
    lock = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Who indexes for the first time makes the lock before all else.
        if any(folder.iterdir()) and not lock.exists():
            raise ValueError(
                f"{folder} holds other files than an index: choose an empty or new folder with "
                "--index"
            )
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OSError(
            f"the index of {videos} cannot be written in {folder}, {error.strerror}: choose "
            "another folder with --index"
        ) from error
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"another process is indexing {videos} in {folder}: wait until it is done, or "
                "choose another folder with --index"
            ) from error
        yield
    finally:
        _held.discard(descriptor)
        # That also unlocks it.
        os.close(descriptor)


_held: set[int] = set()


def _let_go() -> None:
    """Processes that read videos would keep the lock when the one that indexes is killed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)
