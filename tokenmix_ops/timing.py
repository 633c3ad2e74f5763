"""Clocks, contenders timed in turn, ratios, and the machine and code behind a row of data."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

import tokenmix_ops

Timings = dict[str, list[float]]
Turn = Callable[[int], Callable[[], object]]
"""Given a number, which picks the inputs, makes ready and returns what is to be timed."""


class Clock(Protocol):
    """Reads the time on the device whose work is timed."""

    def lead(self) -> None:
        """Lets the host get ahead of the device, so that no launch is waited for."""

    def mark(self) -> Any:
        """The moment at which all work so far is done."""

    def wait(self) -> None:
        """Returns when all work is done; from then on marks can be read."""

    def seconds(self, start: Any, stop: Any) -> float: ...


class HostClock:
    """Of work that is done when its call returns."""

    def lead(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        pass

    def seconds(self, start: float, stop: float) -> float:
        return stop - start


class EventClock:
    """Of a CUDA GPU's current stream, by events in it."""

    # About a millisecond: longer than the host needs to hand over any contender's work.
    CYCLES = 2_000_000

    def lead(self) -> None:
        torch.cuda._sleep(self.CYCLES)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return start.elapsed_time(stop) / 1e3


def time_in_turn(
    contenders: Mapping[str, Turn],
    rounds: int,
    clock: Clock,
    progress: Callable[[int], object] | None = None,
) -> Timings:
    """Seconds of each contender in each of ``rounds`` rounds; in a round all run in turn.

    Drifts of the machine's speed so meet all alike: compare within rounds (`ratio`). All make
    ready before the first runs; each gets another number than its neighbours, so that none finds
    in a cache what the one before it read.
    """
    timings: Timings = {name: [] for name in contenders}
    for done in range(rounds):
        ready = {name: turn(done + i) for i, (name, turn) in enumerate(contenders.items())}
        marks = {}
        for name in contenders:
            run = ready.pop(name)
            clock.lead()
            start = clock.mark()
            run()
            marks[name] = start, clock.mark()
            # What it made ready, a graph for example, need not wait for the others.
            del run
        clock.wait()
        for name, (start, stop) in marks.items():
            timings[name].append(clock.seconds(start, stop))
        if progress is not None:
            progress(done + 1)
    return timings


def time_side_by_side(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Callable[[int], object] | None = None,
) -> Timings:
    """`time_in_turn` on the host, after each contender has run once."""

    def always(run: Callable[[], object]) -> Turn:
        return lambda number: run

    for run in contenders.values():
        run()
    turns = {name: always(run) for name, run in contenders.items()}
    return time_in_turn(turns, rounds, HostClock(), progress)


def ratio(timings: Timings, slower: str, faster: str) -> tuple[float, float, float]:
    """How many times faster one contender is than another: median, lowest and highest quartile."""
    pairs = zip(timings[slower], timings[faster], strict=True)
    ratios = sorted(s / f for s, f in pairs)
    quarter = len(ratios) // 4
    return median(ratios), ratios[quarter], ratios[-1 - quarter]


def figures(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and all rounds, in milliseconds."""
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    return {
        "median_ms": rounded(1e3 * median(ordered)),
        "quartiles_ms": [rounded(1e3 * ordered[i]) for i in (quarter, -1 - quarter)],
        "rounds_ms": [rounded(1e3 * s) for s in seconds],
    }


def rounded(number: float) -> float:
    """To four digits, which is more than any timing is good for."""
    return float(f"{number:.4g}")


def clock_of(device: str) -> Clock:
    """The clock of ``"cpu"`` or ``"cuda"``."""
    return HostClock() if device == "cpu" else EventClock()


def environment(device: str = "cpu", commit: str | None = None) -> dict[str, Any]:
    """Hardware, versions, commit and date: what each row of data carries.

    ``device`` is "cpu" or "cuda", the current GPU; ``commit`` names the code where it lies in no
    repository.
    """
    code = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenmix_ops": tokenmix_ops.__version__,
        "commit": _commit() if commit is None else commit,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    if device == "cpu":
        return {"hardware": _processor(), "threads": torch.get_num_threads(), **code}
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "hardware": gpu.name,
        **code,
        "multiprocessors": gpu.multi_processor_count,
        "memory_gib": round(gpu.total_memory / 2**30, 1),
        "processor": _processor(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": version("triton") if find_spec("triton") else None,
    }


def device_name(device: str) -> str:
    """A device as result files name it: ``"cpu"``, or the GPU's `slug`."""
    return "cpu" if device == "cpu" else slug(torch.cuda.get_device_name())


def slug(hardware: str) -> str:
    """A device's name as it stands in file names: ``"NVIDIA H200"`` is ``"h200"``."""
    words = "".join(c if c.isalnum() else " " for c in hardware.lower()).split()
    return "-".join(word for word in words if word != "nvidia")


def _driver() -> str:
    """The version of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


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
        # The package and the benchmarks count; results and texts may change beside them.
        code = (folder, folder.parent / "bench")
        changed = git("status", "--porcelain", "--", *map(str, code))
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
