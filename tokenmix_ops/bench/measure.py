"""Timing contenders side by side, and the machine and code that a figure belongs to."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tokenmix_ops

Timings = dict[str, list[float]]


def time_side_by_side(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Callable[[int], object] | None = None,
) -> Timings:
    """Seconds of each contender in each of ``rounds`` rounds; in a round all run in turn.

    Drifts of the machine's speed so meet all alike: compare within rounds (`ratio`).
    """
    timings: Timings = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for done in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            timings[name].append(time.perf_counter() - start)
        if progress is not None:
            progress(done + 1)
    return timings


def ratio(timings: Timings, slower: str, faster: str) -> tuple[float, float, float]:
    """How many times faster one contender is than another: median, lowest and highest quartile."""
    pairs = zip(timings[slower], timings[faster], strict=True)
    ratios = sorted(s / f for s, f in pairs)
    quarter = len(ratios) // 4
    return median(ratios), ratios[quarter], ratios[-1 - quarter]


def environment() -> dict[str, Any]:
    """Hardware, versions, commit and date: what each row of data carries."""
    return {
        "hardware": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenmix_ops": tokenmix_ops.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = []
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        # What is measured is the package; results and texts may change beside it.
        changed = git("status", "--porcelain", "--", str(folder.parent))
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
