"""Workers of a data loader that outlive signals, and end with what they read for."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from multiprocessing import active_children
from multiprocessing.sharedctypes import RawArray, RawValue

_PATIENCE = 10.0
_INTERVAL = 0.1


class OutliveSignals:
    """A ``worker_init_fn`` for so many workers: Ctrl-C, and the SIGTERM of a launcher or a cluster,
    reach them too, and must not end them before the process that they read for has finished what
    it is at.

    Whoever stops reading before the loader's end calls `end`, for an exception keeps the loader's
    iterator alive in its traceback. At the latest the exit of the process does, which would wait
    for ever otherwise for workers that do not obey. They leave by themselves, for PyTorch takes
    one that a signal ends for a failure, which it reports wherever the process then is.
    """

    def __init__(self, workers: int) -> None:
        self.ended = RawValue("b", 0)
        self.pids = RawArray("i", max(workers, 1))
        # Before what multiprocessing does at exit, as it is registered later.
        atexit.register(self._let_go)

    def __call__(self, worker: int) -> None:
        self.pids[worker] = os.getpid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._leave_at_end, daemon=True).start()

    def end(self) -> None:
        """End the workers that are still there."""
        self._let_go()
        until = time.monotonic() + _PATIENCE
        for process in active_children():
            if process.pid in list(self.pids):
                process.join(max(0.0, until - time.monotonic()))
                # One that hangs in a decoder may let no other thread run.
                process.kill()

    def _let_go(self) -> None:
        self.ended.value = 1

    def _leave_at_end(self) -> None:
        while not self.ended.value:
            time.sleep(_INTERVAL)
        os._exit(0)
