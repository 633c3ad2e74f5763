"""What a run prints: kept in a file, and shown for as long as somebody reads it."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from pathlib import Path
from select import select

STANDARD_OUTPUT = 1
AT_ONCE = 512
"""Bytes that a pipe takes without waiting, if it takes any."""


class Log:
    """A file that processes append to, copied to this process's standard output.

    The copy ends when the output is closed, and falls behind when nobody reads it: neither stops
    what is logged. Raises OSError if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"")
        self.path, self.shown, self.open = path, 0, True

    def say(self, text: str) -> None:
        """Adds a line, and shows what is new."""
        with self.path.open("ab", buffering=0) as file:
            file.write(f"{text}\n".encode())
        self.show()

    def show(self, patience: float = 0.0) -> None:
        """Copies what is new to the standard output.

        ``patience`` is how many seconds to wait for a reader that takes nothing.
        """
        with self.path.open("rb") as file:
            file.seek(self.shown)
            while self.open and (new := file.read(AT_ONCE)):
                try:
                    if not select([], [STANDARD_OUTPUT], [], patience)[1]:
                        return
                    taken = os.write(STANDARD_OUTPUT, new)
                except OSError:
                    self.open = False
                    return
                self.shown += taken
                file.seek(self.shown)


def print_into(path: Path) -> None:
    """From now on this process, and those that it starts, append to a file what they print."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    if isinstance(sys.stdout, TextIOWrapper):
        # A process that is killed has printed whole lines.
        sys.stdout.reconfigure(line_buffering=True)
