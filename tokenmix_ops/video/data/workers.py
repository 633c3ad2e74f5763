"""Workers of a data loader that outlive signals, and end with what they read for."""

from __future__ import annotations

import atexit
import os
import signal
import time
from multiprocessing import active_children
from multiprocessing.sharedctypes import RawArray, RawValue
from types import FrameType

_PATIENCE = 5.0


class OutliveSignals:
    """A ``worker_init_fn`` for so many workers: Ctrl-C, and the SIGTERM of a launcher or a cluster,
    reach them too, and must not end them before the process that they read for has finished what
    it is at.

    Whoever stops reading before the loader's end calls `end`, for an exception keeps the loader's
    iterator alive in its traceback. At the latest the exit of the process does: it sends SIGTERM,
    and would wait for ever for workers that do not obey.
    """

    def __init__(self, workers: int) -> None:
        self.ended = RawValue("b", 0)
        self.pids = RawArray("i", max(workers, 1))
        # Before what multiprocessing does at exit, as it is registered later.
        atexit.register(self._let_go)

    def __call__(self, worker: int) -> None:
        self.pids[worker] = os.getpid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._handle)

    def end(self) -> None:
        """End the workers that are still there."""
        self._let_go()
        own = [process for process in active_children() if process.pid in list(self.pids)]
        for process in own:
            process.terminate()
        until = time.monotonic() + _PATIENCE
        for process in own:
            process.join(max(0.0, until - time.monotonic()))
            # One that hangs in a decoder hears nothing.
            process.kill()

    def _let_go(self) -> None:
        self.ended.value = 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.ended.value:
            os._exit(0)
