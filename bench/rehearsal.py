"""What a rehearsal on a CPU has in place of a GPU's work: tiny sizes, made-up times and faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from importlib.util import find_spec

import torch

from bench.job import Job
from tokenmix_ops.backends.triton import configs
from tokenmix_ops.testing import Case


class Steps:
    """A clock by which every run takes a second, for rehearsals."""

    def __init__(self) -> None:
        self.now = 0

    def lead(self) -> None:
        pass

    def mark(self) -> int:
        self.now += 1
        return self.now

    def wait(self) -> None:
        pass

    def seconds(self, start: int, stop: int) -> float:
        return float(stop - start)


def tiny(case: Case) -> Case:
    return replace(case, batch=1, num_frames=2, num_tokens=4, num_heads=1, head_dim=16)


REHEARSED_TESTS = """
import os, pytest
def test_without_the_interpreter(): assert "TRITON_INTERPRET" not in os.environ
def test_planted_failure(): assert 1 == 2, "planted: one is not two"
@pytest.mark.skip
def test_skipped(): pass
"""


def tune(job: Job) -> None:
    """Leaves the file that a tuner would write."""
    if find_spec("triton") is not None:
        from tokenmix_ops.backends.triton import launch

        name = launch.architecture(torch.device("cpu")).name
        shutil.copyfile(configs.FOLDER / f"{name}.json", job.results / f"{name}.json")


def abort(job: Job) -> None:
    """Ends as after an error of the driver."""
    job.note.write_text(json.dumps({"part": "what crashes"}))
    os.abort()


def half_a_line(job: Job) -> None:
    """Is killed while it writes."""
    assert job.rows is not None
    with job.rows.open("a") as file:
        file.write('{"part": "half')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def hang(job: Job) -> None:
    """Waits for what never comes, and tells the rehearsal's clock."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job.hung.touch()
    while True:
        signal.pause()
