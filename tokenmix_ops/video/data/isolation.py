"""Calls a function in separate processes, so that a call may hang or crash."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Imports take most of the start-up time.
_START_SECONDS = 300.0
_WAIT_SECONDS = 60.0
_END_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that failed."""

    reason: str
    seconds: float


def in_processes(
    function: Callable[[_Item], _Result], items: Sequence[_Item], workers: int, time_limit: float
) -> Generator[_Result | Failure, None, None]:
    """Call `function` on each item in up to `workers` processes; yield results in item order.

    A call that takes more than `time_limit` seconds, or ends its process, gives a `Failure`, and a
    new process takes over. All processes end with the iterator and with this process. `function`
    and items must be picklable. Raises RuntimeError if a process cannot start.
    """
    todo = deque(enumerate(items))
    done: dict[int, _Result | Failure] = {}
    crew: list[_Worker] = []
    try:
        for place in range(len(items)):
            while place not in done:
                busy = sum(worker.place is not None for worker in crew)
                while len(crew) < min(workers, busy + len(todo)):
                    crew.append(_Worker(function))
                for worker in crew:
                    idle = worker.ready and worker.place is None
                    if idle and todo and worker.give(*todo[0], time_limit):
                        todo.popleft()
                left = min(worker.deadline for worker in crew) - time.monotonic()
                pipes = [worker.pipe for worker in crew]
                spoken = connection.wait(pipes, min(max(left, 0.0), _WAIT_SECONDS))
                for worker in list(crew):
                    if worker.pipe in spoken:
                        if worker.hear(done):
                            continue
                        reason = f"crashed the process reading it ({worker.died()})"
                    elif time.monotonic() >= worker.deadline:
                        worker.end()
                        reason = f"took more than {time_limit:g} s"
                    else:
                        continue
                    crew.remove(worker)
                    if not worker.ready:
                        raise RuntimeError(
                            "a process for reading videos could not start; scripts must guard "
                            'their main code with if __name__ == "__main__"'
                        )
                    if worker.place is not None:
                        done[worker.place] = Failure(reason, time.monotonic() - worker.begun)
            yield done.pop(place)
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    """A process and its current call."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        # Spawn, because a fork copies locks held by other threads but not the threads.
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        with _interrupts_held():
            self.process.start()
        theirs.close()
        self.ready = False
        self.place: int | None = None
        self.begun = time.monotonic()
        self.deadline = self.begun + _START_SECONDS

    def give(self, place: int, item: Any, time_limit: float) -> bool:
        """Start a call; return False if the process has died."""
        try:
            self.pipe.send(item)
        except OSError:
            return False
        self.place, self.begun = place, time.monotonic()
        self.deadline = self.begun + time_limit
        return True

    def hear(self, done: dict[int, Any]) -> bool:
        """Receive a result or the ready message; return False if the process has died."""
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):
            return False
        if self.place is not None:
            done[self.place] = said
        self.ready, self.place, self.deadline = True, None, float("inf")
        return True

    def died(self) -> str:
        """Describe how the process ended."""
        self.process.join(_END_SECONDS)
        code = self.process.exitcode
        self.end()
        if code is None:
            return "it stopped responding"
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def end(self) -> None:
        self.process.kill()
        # A process blocked on a dead file server cannot be killed, so do not wait forever.
        self.process.join(_END_SECONDS)
        self.pipe.close()


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    # A hanging call does not notice the closed pipe when the parent is killed.
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    pipe.send(None)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        pipe.send(function(item))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block Ctrl-C in processes started here; their parent ends them."""
    # Start the resource tracker first, because starting it would unblock interrupts.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
