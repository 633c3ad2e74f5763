"""The tests on a GPU, counted in rows: they say what is broken, and stop nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.rows import Row

ROOT = Path(__file__).parent.parent
TESTS = ("tests/backends", "tests/test_ops.py", "tests/test_functional.py")
EACH = 100
"""Reports after which the counts are written, in case there is no time for the end."""


class Counter:
    """A plugin of pytest that counts outcomes and names failures, a row each."""

    def __init__(self, keep: Callable[[list[Row]], object], **facts: Any) -> None:
        self.keep, self.facts = keep, facts
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.reports = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report)
        elif report.skipped:
            self.counts["skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1
        self.reports += 1
        if self.reports % EACH == 0:
            self._count(finished=False)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report)

    def pytest_sessionfinish(self) -> None:
        self._count(finished=True)

    def _failed(self, report: Any) -> None:
        self.counts["failed"] += 1
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash else str(report.longrepr)
        lines = text.strip().splitlines() or [""]
        # Of a failed collection the last line is the error.
        why = lines[0 if crash else -1]
        self.keep([{"part": "tests", "failure": report.nodeid, "why": why[:300]}])

    def _count(self, finished: bool) -> None:
        self.keep([{"part": "tests", **self.counts, "finished": finished, **self.facts}])


def arguments(tests: Sequence[str], workers: int) -> tuple[list[str], list[str]]:
    """What pytest is told, and the plugins that are missing.

    Workers are as many as processors: pytest-xdist's own "auto" counts physical cores. A thread
    ends a test that takes a minute, with its worker, because a kernel that hangs heeds no signal.
    """
    plugins = {
        # Ways that keep tests together run the test that killed a worker again, or hang.
        "xdist": ["-n", str(workers), "--dist", "worksteal"],
        "pytest_timeout": ["--timeout", "60", "--timeout-method", "thread"],
    }
    missing = [name for name in plugins if find_spec(name) is None]
    told = [word for name, words in plugins.items() if name not in missing for word in words]
    # The log of a red suite has to stay small.
    shown = ["--tb", "short", "--show-capture", "no"]
    return [*tests, "-p", "no:cacheprovider", *shown, *told], missing


def run_tests(
    told: Sequence[str], log: Path, keep: Callable[[list[Row]], object], missing: Sequence[str]
) -> None:
    """Runs pytest in this process, its output in a file; rows of counts and failures are kept."""
    import pytest

    os.environ.pop("TRITON_INTERPRET", None)
    os.chdir(ROOT)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([path] if path else [])])
    with log.open("w") as kept, redirect_stdout(kept), redirect_stderr(kept):
        # For the workers too.
        for descriptor in (1, 2):
            os.dup2(kept.fileno(), descriptor)
        pytest.main([*told], plugins=[Counter(keep, missing=list(missing))])
