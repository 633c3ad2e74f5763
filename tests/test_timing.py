"""Contenders run in turn, ratios pair the rounds, and rows name machine and code."""

import inspect
import subprocess
from types import SimpleNamespace

import pytest
import torch

from tokenmix_ops.timing import (
    EventClock,
    environment,
    ratio,
    slug,
    time_in_turn,
    time_side_by_side,
)


def test_rounds_run_all_contenders_in_turn():
    order, seen = [], []
    timings = time_side_by_side(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, seen.append
    )
    assert order == ["a", "b"] * 4
    assert seen == [1, 2, 3]
    assert [len(seconds) for seconds in timings.values()] == [3, 3]


def test_ratio_pairs_the_rounds():
    timings = {"slow": [2.0, 30.0, 4.0, 8.0, 8.0], "fast": [1.0, 10.0, 1.0, 2.0, 8.0]}
    assert ratio(timings, "slow", "fast") == (3.0, 2.0, 4.0)


class Script:
    """A clock that notes what happens, and by which each moment is a second after the last."""

    def __init__(self):
        self.notes, self.now = [], 0

    def lead(self):
        self.notes.append("lead")

    def mark(self):
        self.now += 1
        return self.now

    def wait(self):
        self.notes.append("wait")

    def seconds(self, start, stop):
        return float(stop - start)


def test_all_make_ready_before_any_runs_and_neighbours_get_other_inputs():
    clock = Script()

    def turn(name):
        def ready(number):
            clock.notes.append(f"{name} ready {number}")
            return lambda: clock.notes.append(f"{name} runs {number}")

        return ready

    timings = time_in_turn({"a": turn("a"), "b": turn("b")}, 2, clock)
    first = ["a ready 0", "b ready 1", "lead", "a runs 0", "lead", "b runs 1", "wait"]
    assert clock.notes[:7] == first
    assert clock.notes[7:9] == ["a ready 1", "b ready 2"]
    assert timings == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_rows_of_a_gpu_carry_its_name_and_versions(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, total_memory=2**37)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def run(command, **options):
        if command[0] == "nvidia-smi":
            return SimpleNamespace(stdout="580.159.04\n")
        raise OSError("no git here")

    monkeypatch.setattr(subprocess, "run", run)
    found = environment("cuda", "0123456789")
    wanted = {"hardware": "NVIDIA H200", "driver": "580.159.04", "commit": "0123456789"}
    assert wanted.items() <= found.items()
    assert {"torch", "triton", "cuda", "cudnn", "date", "multiprocessors"} <= found.keys()
    assert environment("cuda")["commit"] == "unknown"


def test_devices_have_short_names():
    assert slug("NVIDIA H200") == "h200"
    assert slug("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"


@pytest.mark.interfaces
def test_a_gpu_can_be_kept_busy_while_work_is_handed_over():
    assert list(inspect.signature(torch.cuda._sleep).parameters) == ["cycles"]
    if torch.cuda.is_available():
        EventClock().lead()
