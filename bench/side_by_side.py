"""Tasks done side by side in processes that compile, with a count of what is done."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TextIO, TypeVar

Result = TypeVar("Result")
INTERRUPT = {signal.SIGINT}


def each(
    function: Callable[..., Result],
    tasks: Sequence[tuple[Any, ...]],
    start: Callable[[], object] | None = None,
) -> Iterator[tuple[int, Result]]:
    """What ``function`` returns for the arguments of each task, with the task's number, unordered.

    As many processes as there are cores do them; each calls ``start`` first. Both are functions of
    a module. Ctrl-C ends all of them at once.
    """
    pool = ProcessPoolExecutor(
        os.cpu_count(), mp_context=get_context("spawn"), initializer=_begin, initargs=(start,)
    )
    try:
        with _interrupts_held_back():
            numbers = {pool.submit(function, *task): n for n, task in enumerate(tasks)}
        for future in as_completed(numbers):
            yield numbers[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes that start inside hold them back too, until `_begin`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(start: Callable[[], object] | None) -> None:
    # The process that waits for this one has the last word, so this one dies without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPT)
    if start is not None:
        start()


def counter(what: str, file: TextIO | None = None) -> Callable[[int, int], None]:
    """Tells how many are done of how many: a terminal in one line that changes, a log in up to ten
    lines. ``what`` has a place for "3 of 7"; ``file`` is standard error by default."""

    def tell(done: int, total: int) -> None:
        out = file or sys.stderr
        text = what.format(f"{done} of {total}")
        if out.isatty():
            print(f"\r{text}", end="\n" if done == total else "", file=out, flush=True)
        elif 10 * done // total > 10 * (done - 1) // total:
            print(text, file=out, flush=True)

    return tell
