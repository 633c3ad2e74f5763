"""Ctrl-C and SIGTERM, held back until the update that runs is finished."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Context in which the first signal sets ``requested``, and the second acts as it always does.

    The handlers from before come back at the end. Off the main thread, which alone gets signals,
    it does nothing.
    """

    def __init__(self) -> None:
        main = threading.current_thread() is threading.main_thread()
        self.signals = (signal.SIGINT, signal.SIGTERM) if main else ()
        self.requested = False
        self.immediate = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in self.signals:
            self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it there is nothing to finish: a signal raises KeyboardInterrupt, also an earlier
        one."""
        if self.requested:
            raise KeyboardInterrupt
        self.immediate = True
        try:
            yield
        finally:
            self.immediate = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        if self.immediate:
            raise KeyboardInterrupt

    def _restore(self) -> None:
        while self.before:
            number, handler = self.before.popitem()
            signal.signal(number, handler)
