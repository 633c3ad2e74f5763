"""Data loader workers that ignore signals and end with their parent process."""

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
    """A ``worker_init_fn`` that makes ``workers`` ignore SIGINT and SIGTERM.

    Ctrl-C and a launcher's SIGTERM reach workers too, and must not end them before their parent
    has finished its step. Call `end` when you stop reading early, because an exception's traceback
    keeps the loader's iterator alive. Process exit ends the workers too, which it would otherwise
    await forever. Workers exit by themselves, because PyTorch reports a worker killed by a signal
    as a failure.
    """

    def __init__(self, workers: int) -> None:
        self.ended = RawValue("b", 0)
        self.pids = RawArray("i", max(workers, 1))
        # Registered later, so it runs before multiprocessing's exit handler.
        atexit.register(self._let_go)

    def __call__(self, worker: int) -> None:
        self.pids[worker] = os.getpid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._leave_at_end, daemon=True).start()

    def end(self) -> None:
        """End the remaining workers."""
        self._let_go()
        until = time.monotonic() + _PATIENCE
        for process in active_children():
            if process.pid in list(self.pids):
                process.join(max(0.0, until - time.monotonic()))
                # A decoder that hangs can block all threads of its worker.
                process.kill()

    def _let_go(self) -> None:
        self.ended.value = 1

    def _leave_at_end(self) -> None:
        while not self.ended.value:
            time.sleep(_INTERVAL)
        os._exit(0)
