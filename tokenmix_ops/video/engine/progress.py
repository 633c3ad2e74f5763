"""How far a training is, in the terminal: a bar, or a line now and then where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
from rich import progress as bars
from rich.console import Console

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 30.0


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch had allocated on a GPU; what the process has now on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def say(console: Console, text: str) -> None:
    """Prints a line unchanged: no markup in brackets, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class Progress:
    """Context that shows ``total`` updates, of which ``done`` were there before.

    Give it a quiet console on every process but the first.
    """

    def __init__(self, console: Console, *, total: int, done: int, per_epoch: int) -> None:
        self.console = console
        self.total, self.done, self.per_epoch = total, done, per_epoch
        self.first = done
        self.began = self.line = time.monotonic()
        self.live = console.is_terminal and not console.quiet
        self.bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[text]}"),
            bars.TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )

    def __enter__(self) -> Progress:
        self.bar.start()
        self.task = self.bar.add_task("training", total=self.total, completed=self.done, text="")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        say(self.console, text)

    def update(self, line: Mapping[str, Any]) -> None:
        """Shows an update by its line of the log."""
        self.done = line["update"]
        epoch = f"epoch {(self.done - 1) // self.per_epoch + 1}"
        text = (
            f"loss {line['loss']:.4f}, {line['clips_per_second']:.1f} clips/s, "
            f"{line['memory'] / 2**30:.1f} GiB"
        )
        if self.live:
            self.bar.update(self.task, completed=self.done, description=epoch, text=text)
            return
        now = time.monotonic()
        if now - self.line >= SECONDS_BETWEEN_LINES or self.done == self.total:
            self.line = now
            each = (now - self.began) / (self.done - self.first)
            left = timedelta(seconds=round(each * (self.total - self.done)))
            self.say(f"{epoch}, update {self.done} of {self.total}: {text}, {left} left")

    def track(self, items: Iterable[Item], description: str) -> Iterator[Item]:
        """Gives the items on, and shows how many; for evaluations."""
        total = _length(items)
        part = self.bar.add_task(description, total=total, text="")
        began = line = time.monotonic()
        try:
            for count, item in enumerate(items, 1):
                yield item
                self.bar.update(part, completed=count)
                now = time.monotonic()
                if not self.live and now - line >= SECONDS_BETWEEN_LINES:
                    line = now
                    of_all = "" if total is None else f" of {total}"
                    seconds = timedelta(seconds=round(now - began))
                    self.say(f"{description}: {count}{of_all} in {seconds}")
        finally:
            self.bar.remove_task(part)


class Evaluation(Progress):
    """Context that shows how far an evaluation alone is."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, total=0, done=0, per_epoch=1)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self


def _length(items: object) -> int | None:
    return len(items) if hasattr(items, "__len__") else None
