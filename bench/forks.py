"""Processes of which each does one task, and may die of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from math import inf
from multiprocessing import connection, get_context
from typing import Any


def in_processes(
    target: Callable[..., None],
    tasks: Iterable[tuple[Any, ...]],
    processes: int,
    seconds: float = inf,
) -> None:
    """Calls ``target(*task)`` for each task in a process that may die of it, ``processes`` at a
    time; kills one that takes longer than ``seconds``.

    They are forks: this process must not have used the GPU.
    """
    context = get_context("fork")
    waiting = iter(tasks)
    running: dict[Any, Any] = {}
    limits: dict[Any, float] = {}
    while True:
        while len(running) < processes and (task := next(waiting, None)) is not None:
            process = context.Process(target=target, args=task)
            process.start()
            running[process.sentinel] = process
            limits[process.sentinel] = time.monotonic() + seconds
        if not running:
            return
        first = min(limits.values()) - time.monotonic()
        ended = connection.wait(list(running), None if first == inf else max(0.0, first))
        late = [one for one in running if limits[one] <= time.monotonic() and one not in ended]
        for sentinel in (*ended, *late):
            process = running.pop(sentinel)
            del limits[sentinel]
            if sentinel in late:
                process.kill()
            process.join()
