"""A limit on the total size of a folder's files, held across processes that may be killed.

Files are in subfolders named by two hexadecimal digits. An unfinished file's name ends in ".part",
and its writer holds a lock on it, which the system releases when the process dies. The file "taken"
holds the sum of all sizes. A process locks it to change it, and to make, rename or remove a file.
The sum goes up before a file is made and down after one is removed: a kill in between leaves it too
high, never too low, until the next recount.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None  # type: ignore[assignment]

_BLOCK = 4096
_FOLDER = re.compile("[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]+\.frames(\.part)?")


def have_locks() -> bool:
    """Whether the system has POSIX file locks."""
    return fcntl is not None


class Quota:
    """At most ``limit`` bytes for the files of ``folder``, counted in whole blocks."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def recount(self) -> None:
        """Count what is there, and remove what writers left that are dead."""
        with self._locked() as taken:
            self._write(taken, self._count())

    def taken(self) -> int:
        """The sum of all sizes."""
        with self._locked() as taken:
            return self._read(taken)

    def take(self, file: Path, size: int) -> BinaryIO | None:
        """Open the file that is to become ``file`` and has ``size`` bytes; its lock is held.

        None if there is no room, if another process is writing it, or if it is there already.
        """
        part = _part(file)
        with self._locked() as taken:
            total = self._read(taken)
            left = None if file.exists() else self._left_by_the_dead(part)
            if left is None:
                return None
            total -= left
            room = total + _blocks(size) <= self.limit
            self._write(taken, total + _blocks(size) if room else total)
            if not room:
                return None
            part.parent.mkdir(exist_ok=True)
            opened = part.open("x+b")
            try:
                _try_lock(opened.fileno())
                # From here on, recounts see the file.
                opened.truncate(size)
            except BaseException:
                opened.close()
                part.unlink()
                self._write(taken, total)
                raise
            return opened

    def keep(self, file: Path) -> None:
        """Give a finished file its name."""
        with self._locked():
            _part(file).replace(file)

    def give_back(self, file: Path) -> None:
        """Remove a file that is not going to be finished, by whom it was taken."""
        self._remove(_part(file), None)

    def remove(self, file: Path, descriptor: int) -> None:
        """Remove a file, unless it is no longer the one that is open."""
        self._remove(file, os.fstat(descriptor))

    def _remove(self, file: Path, wanted: os.stat_result | None) -> None:
        with self._locked() as taken, suppress(FileNotFoundError):
            info = file.stat()
            if wanted is None or os.path.samestat(info, wanted):
                file.unlink()
                self._write(taken, self._read(taken) - _blocks(info.st_size))

    def _left_by_the_dead(self, part: Path) -> int | None:
        """Remove a file whose writer is dead, and say how much it took; None if it is alive."""
        try:
            with part.open("r+b") as opened:
                if not _try_lock(opened.fileno()):
                    return None
                size = os.fstat(opened.fileno()).st_size
                part.unlink()
                return _blocks(size)
        except FileNotFoundError:
            return 0

    def _count(self) -> int:
        total = 0
        for folder in self.folder.iterdir():
            if not _FOLDER.fullmatch(folder.name):
                continue
            for file in folder.iterdir():
                if not _FILE.fullmatch(file.name):
                    continue
                if file.suffix == ".part" and self._left_by_the_dead(file) is not None:
                    continue
                total += _blocks(file.stat().st_size)
        return total

    @contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self.folder / "taken", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _read(self, taken: int) -> int:
        text = os.pread(taken, 64, 0)
        # A power failure may have spoilt it.
        return int(text) if re.fullmatch(rb"[0-9]{20}\n", text) else self._count()

    def _write(self, taken: int, total: int) -> None:
        os.pwrite(taken, b"%020d\n" % max(total, 0), 0)


def _part(file: Path) -> Path:
    return file.with_name(file.name + ".part")


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
