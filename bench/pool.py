"""Processes that do tasks beside this one, each of which may die of its task."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

Function = Callable[..., "str | None"]
Answer = Future["str | None"]


@dataclass(frozen=True)
class _Task:
    function: Function
    arguments: tuple[Any, ...]
    seconds: float
    answer: Answer


class Pool:
    """So many processes, which work off a queue. Those at work end with the block.

    They end by themselves, after the task at hand, if this process is killed.
    """

    def __init__(self, processes: int) -> None:
        self._waiting: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._workers: set[_Worker] = set()
        self._threads = [threading.Thread(target=self._work) for _ in range(processes)]

    def __enter__(self) -> Pool:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._open = False
            for task in self._waiting:
                task.answer.cancel()
            self._waiting.clear()
            for worker in list(self._workers):
                worker.process.kill()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def submit(
        self, function: Function, *arguments: object, seconds: float, urgent: bool = False
    ) -> Answer:
        """What ``function(*arguments)`` will answer, or that its process died or took longer than
        ``seconds``. An urgent task is the next to be begun. ``function`` is one of a module."""
        task = _Task(function, arguments, seconds, Future())
        with self._changed:
            if urgent:
                self._waiting.appendleft(task)
            else:
                self._waiting.append(task)
            self._changed.notify()
        return task.answer

    def _next(self) -> _Task | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._open)
            return self._waiting.popleft() if self._waiting else None

    def _work(self) -> None:
        worker: _Worker | None = None
        while (task := self._next()) is not None:
            if not task.answer.set_running_or_notify_cancel():
                continue
            try:
                worker = worker or self._new_worker()
            except OSError as error:
                task.answer.set_result(f"no process for it: {error}")
                continue
            task.answer.set_result(worker.ask(task))
            if not worker.alive:
                self._workers.discard(worker)
                worker = None
        if worker is not None:
            worker.stop()

    def _new_worker(self) -> _Worker:
        # Under the lock, so that none is missed when the pool closes.
        with self._changed:
            worker = _Worker()
            if self._open:
                self._workers.add(worker)
            else:
                worker.stop()
            return worker


class _Worker:
    """A process that does one task after the other."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.alive = True

    def ask(self, task: _Task) -> str | None:
        answer: str | None = "its process died"
        try:
            self.pipe.send((task.function, task.arguments))
            if self.pipe.poll(task.seconds):
                answer = self.pipe.recv()
                return answer
            answer = f"took longer than {task.seconds:g} s"
        except (EOFError, OSError):
            pass
        self.stop()
        return answer

    def stop(self) -> None:
        self.alive = False
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    # Both fail once the process that asks is gone.
    try:
        while True:
            function, arguments = pipe.recv()
            answer = function(*arguments)
            if torch.cuda.is_initialized():
                try:
                    torch.cuda.synchronize()
                except RuntimeError:
                    # After some errors a process can use its GPU no more: another takes over.
                    os._exit(1)
            pipe.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
