"""Races leave out what fails, budgets hold, and reasons are one line."""

from dataclasses import replace

import pytest
import torch

from bench import passes
from bench.passes import PASSES, Contender, failure, race


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


def contender(call):
    sets = [(torch.randn(3, 4),) for _ in range(2)]
    return Contender(call, sets, [torch.randn(3, 4) for _ in sets])


@pytest.mark.parametrize("of_pass", PASSES)
def test_a_race_leaves_out_what_fails_and_says_why(of_pass, monkeypatch):
    monkeypatch.setattr(passes, "FEWEST_ROUNDS", 3)

    def hungry(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    def moody(x):
        raise NotImplementedError("not for\nthis")

    racers = {"hungry": hungry, "double": lambda x: 2 * x, "moody": moody}
    found = race({name: contender(call) for name, call in racers.items()}, of_pass, Script(), 0.0)
    assert found.timings == {"double": [1.0, 1.0, 1.0]}
    reasons = {"hungry": "out of memory", "moody": "NotImplementedError: not for"}
    assert found.reasons == reasons


def test_a_race_without_room_for_all_leaves_out_the_hungriest(monkeypatch):
    calls = []

    def warm_up(ready, clock, extra_bytes, name):
        extra_bytes[name] = len(name)

    def last(x):
        calls.append(x)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    monkeypatch.setattr(passes, "_warm_up", warm_up)
    racers = {"ab": lambda x: x, "abc": lambda x: x, "a": last}
    found = race({name: contender(c) for name, c in racers.items()}, "forward", Script(), 0.0)
    assert list(found.timings) == ["ab", "a"]
    assert found.reasons == {"abc": "beside the others: out of memory"}


def test_a_backward_pass_includes_the_parameters():
    layer = torch.nn.Linear(4, 4)
    inputs = contender(layer)
    ready = passes.turn(replace(inputs, parameters=tuple(layer.parameters())), "backward")
    assert [tuple(g.shape) for g in ready(0)()] == [(3, 4), (4, 4), (4,)]
    assert layer.weight.grad is None


def test_failures_are_one_line_with_what_was_warned_of():
    def refuse():
        import warnings

        warnings.warn("heads are too wide\nsecond line", stacklevel=1)
        raise RuntimeError("No available kernel.\nAborting.")

    assert failure(refuse) == "RuntimeError: No available kernel.; heads are too wide"
    assert failure(lambda: None) is None


def test_parts_that_fail_or_come_too_late_are_named(capsys):
    kept = []

    def broken():
        raise ValueError("no such shape\n...")

    parts = [("one", lambda: [{"a": 1}]), ("two", broken), ("three", lambda: [{"a": 3}])]
    left_out = passes.run_parts(parts, 1e6, kept.append)
    assert kept == [[{"a": 1}], [{"a": 3}]]
    assert left_out == ["two: ValueError: no such shape ..."]
    assert passes.run_parts(parts, -1, kept.append) == [
        f"{name}: the time was up" for name in ("one", "two", "three")
    ]
