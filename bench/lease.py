"""A time-boxed run on a GPU: stages in processes of their own, which may die of what they measure.

This process imports no PyTorch, so nothing that happens on the GPU can stop it. It starts the
stages, kills those that overrun their time or stall, and keeps what they wrote: rows, one file,
whole lines. A stage that died in the middle goes on without the contender that broke it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import inf
from multiprocessing import get_context, parent_process
from multiprocessing.context import ForkServerContext
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from bench.job import LOG, Job
from bench.log import Log, print_into
from bench.rows import Row, append_rows, repair, whole_rows
from bench.summary import summary

DONE, TIME_UP = "done", "its time was up"
MARGIN = 5.0
"""Seconds of a run that no stage gets: for killing the last one and saying so."""
LEAST = 60.0
"""A shorter run would not measure anything."""


@dataclass(frozen=True)
class Stage:
    """One process of a run.

    Args:
        seconds: its share of the time, in seconds of a run that has just enough for all.
        least: a shorter share is not worth a start.
        patience: after so many seconds without a sign of life it counts as hung.
        resumes: whether a new process goes on where one died.
        ends: how it may end in a run that goes well.
    """

    name: str
    seconds: float
    least: float
    patience: float = inf
    resumes: bool = False
    ends: tuple[str, ...] = (DONE,)


DEVICE = Stage("device", 120, 0)
COMPILE = Stage("compile", inf, 0)
PLAN = (
    Stage("facts", 15, 4),
    Stage("smoke", 25, 10),
    Stage("main", 90, 20, patience=60, resumes=True),
    Stage("tests", 110, 30),
    Stage("tune", 160, 45),
    Stage("again", 170, 15, patience=60, resumes=True, ends=(DONE, TIME_UP)),
    Stage("report", 10, 3),
)
"""In order. What a stage does stands in `bench.gpu` under its name."""
FAULTS = (
    Stage("planted crash", 5, 0, ends=("killed by SIGABRT",)),
    Stage("planted half line", 5, 0, ends=("killed by SIGKILL",)),
    Stage("planted hang", 5, 0, ends=(TIME_UP,)),
    Stage("planted stall", 5, 0, patience=1, ends=("stalled for 1 s",)),
)
"""Stages that go wrong in the way they should, for rehearsals."""
REHEARSAL = (*PLAN[:2], *FAULTS, *PLAN[2:])
REHEARSING = (
    "A rehearsal on a CPU: shapes are tiny, times are made up (a second for each call), and "
    "planted stages go wrong on purpose."
)


def allowance(stages: Sequence[Stage], left: float) -> float:
    """Seconds for the first of the stages that are left to run in ``left`` seconds.

    Time is divided in proportion to their shares, so what a stage does not use goes to all later
    ones, and a short run shortens all alike.
    """
    return max(0.0, left) * stages[0].seconds / sum(stage.seconds for stage in stages)


class LeaseClock(Protocol):
    """The time of a run."""

    def now(self) -> float: ...

    def wait(self, process: Any, seconds: float) -> None:
        """Returns when the process has ended, or the time has passed."""


class WallClock:
    def now(self) -> float:
        return time.monotonic()

    def wait(self, process: Any, seconds: float) -> None:
        process.join(seconds)


class RehearsalClock:
    """Stands still while a process works, however slowly, and jumps ahead when one says that it
    hangs."""

    def __init__(self, hung: Path) -> None:
        self.hung, self.time = hung, 0.0

    def now(self) -> float:
        return self.time

    def wait(self, process: Any, seconds: float) -> None:
        process.join(0.02)
        if self.hung.exists():
            self.time += seconds


class Lease:
    """One run of a plan. ``left_out`` says what did not end as it should."""

    def __init__(
        self,
        results: Path,
        seconds: float,
        commit: str | None = None,
        dry: bool = False,
        plan: Sequence[Stage] = PLAN,
    ) -> None:
        # The tests run in another folder.
        self.results = results.absolute()
        self.seconds, self.commit, self.dry = seconds, commit, dry
        self.plan = plan
        self.rows: Path | None = None
        self.left_out: list[str] = []
        self.context: Any = get_context("forkserver")

    def run(self) -> None:
        """Runs all stages; takes no longer than ``seconds``, whatever happens in them.

        RuntimeError if the time is too short, if the folder cannot be written or has the rows of an
        earlier run, and if this machine has nothing to run on.
        """
        if not LEAST <= self.seconds < inf:
            raise RuntimeError(f"expected at least {LEAST:g} seconds, got {self.seconds:g}")
        if earlier := sorted(self.results.glob("gpu-*.jsonl")):
            raise RuntimeError(
                f"expected a folder without rows of an earlier run, got {self.results} with "
                f"{earlier[0].name}: name another folder"
            )
        try:
            self.results.mkdir(parents=True, exist_ok=True)
            self.log = Log(self.results / LOG)
        except OSError as error:
            raise RuntimeError(f"cannot write into {self.results}: {error.strerror}") from error
        if self.dry:
            self.log.say(REHEARSING)
        try:
            self._run_plan()
        except KeyboardInterrupt:
            self.log.say("interrupted")
            raise
        else:
            if not self.left_out:
                self.log.say(f"{'rehearsal' if self.dry else 'run'} went as planned")
        finally:
            if self.rows is not None:
                folder = shlex.quote(str(self.results))
                self.log.say(
                    f"rows: {self.rows}; python -m bench report --results {folder} prints their "
                    "tables again"
                )
            self.log.show(patience=2)

    def _run_plan(self) -> None:
        with tempfile.TemporaryDirectory(prefix="lease-", ignore_cleanup_errors=True) as work:
            self.work = Path(work)
            hung = self._job(DEVICE, inf).hung
            self.clock: LeaseClock = RehearsalClock(hung) if self.dry else WallClock()
            self.end = self.clock.now() + self.seconds - MARGIN
            # Importing PyTorch takes seconds: once for all stages, which are forks.
            get_context("forkserver").set_forkserver_preload(["bench.gpu"])
            self._look_at_device()
            background = self._start(COMPILE, inf)
            try:
                for number in range(len(self.plan)):
                    if not background.is_alive():
                        self._job(COMPILE, inf).compiling.unlink(missing_ok=True)
                    self._stage(number)
            finally:
                _kill(background)

    def _look_at_device(self) -> None:
        job = self._job(DEVICE, inf)

        def look() -> str:
            return self._attempt(DEVICE, min(self.end, self.clock.now() + DEVICE.seconds))

        outcome = look()
        if not job.facts.exists() and isinstance(self.context, ForkServerContext):
            # Perhaps because of what the fork inherited.
            self.context = get_context("spawn")
            outcome = look()
        if not job.facts.exists():
            raise RuntimeError(_noted(job).get("why", outcome))
        self.facts = json.loads(job.facts.read_text())
        # Rehearsals are no results of a card.
        suite = "rehearsal" if self.dry else "gpu"
        self.rows = self.results / f"{suite}-{self.facts['device']}.jsonl"
        # Of an earlier rehearsal.
        self.rows.unlink(missing_ok=True)

    def _stage(self, number: int) -> None:
        """Runs one stage of the plan, if there is time enough, and shows what it wrote."""
        stage = self.plan[number]
        left = self.end - self.clock.now()
        seconds = allowance(self.plan[number:], left)
        if seconds < stage.least:
            outcome = f"skipped: {max(0.0, seconds):.0f} s left for it, needs {stage.least:.0f} s"
            self._keep({"part": "stage", "stage": stage.name, "outcome": outcome})
        else:
            self.log.say(f"--- {stage.name}: at most {seconds:.0f} s of {left:.0f} s")
            start = self.clock.now()
            known = len(self._read())
            outcome = self._run(stage, start + seconds)
            took = round(self.clock.now() - start, 1)
            self._keep({"part": "stage", "stage": stage.name, "outcome": outcome, "took_s": took})
            self._show(known)
        as_planned = ", as planned" if outcome in stage.ends and outcome != DONE else ""
        self.log.say(f"--- {stage.name}: {outcome}{as_planned}")
        if outcome not in stage.ends:
            self.left_out.append(f"{stage.name}: {outcome}")

    def _show(self, known: int) -> None:
        """Tables of the rows after those that are known."""
        try:
            if text := summary(self._read()[known:]):
                self.log.say(text)
        # A row that nobody expected must not end the run.
        except Exception:
            self.log.say(traceback.format_exc())

    def _run(self, stage: Stage, until: float) -> str:
        """How a stage ends, which may take several processes."""
        while True:
            outcome = self._attempt(stage, until)
            if outcome == DONE:
                return outcome
            broken = {"part": "broken", "stage": stage.name, "outcome": outcome}
            note = _noted(self._job(stage, 0))
            self._keep({**broken, "during": note})
            self.log.say(f"{stage.name}, {_told(note)}: {outcome}")
            too_late = until - self.clock.now() < stage.least
            if not stage.resumes or "part" not in note or too_late:
                return outcome

    def _attempt(self, stage: Stage, until: float) -> str:
        """How one process of a stage ends."""
        job = self._job(stage, until - self.clock.now())
        job.note.unlink(missing_ok=True)
        process = self._start(stage, job.seconds)
        try:
            outcome = self._watch(process, job, stage, until)
        finally:
            # Also what it leaves behind.
            _kill(process)
            job.hung.unlink(missing_ok=True)
        if self.rows and (lost := repair(self.rows)):
            self.log.say(f"cut {lost} bytes of an unfinished line from {self.rows}")
            self._keep({"part": "repair", "stage": stage.name, "bytes": lost})
        return outcome or _ending(process.exitcode)

    def _watch(self, process: Any, job: Job, stage: Stage, until: float) -> str | None:
        """Waits for a process; why it has to be killed, None if it ended."""
        sign, seen = None, self.clock.now()
        while process.is_alive():
            now = self.clock.now()
            if now >= until:
                return TIME_UP
            if (latest := self._sign_of_life(job)) != sign:
                sign, seen = latest, now
            if now - seen >= stage.patience:
                return f"stalled for {stage.patience:g} s"
            self.clock.wait(process, min(1.0, until - now))
            self.log.show()
        return None

    def _sign_of_life(self, job: Job) -> tuple[float, ...]:
        paths = [path for path in (job.note, self.rows) if path is not None]
        return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)

    def _start(self, stage: Stage, seconds: float) -> Any:
        job = self._job(stage, seconds)
        process = self.context.Process(target=_child, args=(job,))
        try:
            process.start()
        except (EOFError, OSError):
            # The process that forks has died: start each from nothing.
            self.context = get_context("spawn")
            process = self.context.Process(target=_child, args=(job,))
            process.start()
        return process

    def _job(self, stage: Stage, seconds: float) -> Job:
        return Job(stage.name, self.results, self.work, seconds, self.dry, self.commit, self.rows)

    def _keep(self, row: Row) -> None:
        assert self.rows is not None
        append_rows(self.rows, [{**row, **self.facts}])

    def _read(self) -> list[Row]:
        assert self.rows is not None
        return whole_rows(self.rows) if self.rows.exists() else []


def _noted(job: Job) -> dict[str, Any]:
    """What a process was doing when it ended."""
    try:
        found: dict[str, Any] = json.loads(job.note.read_text())
    except (OSError, ValueError):
        return {}
    return found


def _told(note: Row) -> str:
    doing = [str(note[key]) for key in ("part", "contender", "pass") if note.get(key)]
    why = [str(note["why"])] if "why" in note else []
    return ", ".join([*(doing or ["at the start"]), *why])


def _ending(status: int | None) -> str:
    if status == 0:
        return DONE
    if status is not None and status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


def _kill(process: Any) -> None:
    """Kills a process with all that it started; waits for its end, which a driver can hold up."""
    for kill in (os.killpg, os.kill):
        try:
            kill(process.pid, signal.SIGKILL)
            break
        except (ProcessLookupError, PermissionError):
            # Not yet, or no longer, at the head of a group.
            continue
    process.join(2)


def _end_with_parent() -> None:
    """Kills this process, with all that it started, once the run's own is gone: that may have been
    killed itself."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os.killpg(os.getpid(), signal.SIGKILL)

    Thread(target=wait, daemon=True).start()


def _child(job: Job) -> None:
    """The process of a stage."""
    os.setsid()
    _end_with_parent()
    print_into(job.log)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(job.work / "inductor")
    status = 1
    try:
        from bench import gpu, kernel_archive, kernel_hits

        if find_spec("triton") is not None:
            os.environ.update(kernel_archive.variables(job.kernels))
            kernel_hits.listen(job.hits)
        gpu.STAGES[job.stage](job)
        status = 0
    except BaseException as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        job.note.write_text(json.dumps({**_noted(job), "why": why}))
    sys.stdout.flush()
    sys.stderr.flush()
    # After some errors even a normal end would wait for the GPU for ever.
    os._exit(status)
