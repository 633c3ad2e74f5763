"""Contenders must be right; races leave out what fails, budgets hold, reasons are one line."""

from dataclasses import replace

import pytest
import torch

import tokenmix_ops as tm
from bench import passes
from bench.passes import BACKENDS, PASSES, Contender, checked, failure, fault, race, relative_errors
from tokenmix_ops.peers import operators as ways
from tokenmix_ops.testing import Case


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


def test_nobody_goes_on_with_a_broken_gpu(monkeypatch):
    def broken(*ignored):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\n...")

    told = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    racers = {"first": contender(broken), "second": contender(lambda x: x)}
    with pytest.raises(passes.BrokenDevice, match="RuntimeError: CUDA error: an illegal memory"):
        race(racers, "forward", Script(), 0.0, begin=lambda *what: told.append(what))
    assert told == [("first", "forward")]


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


TINY = Case(tm.Mixing.released(), batch=2, num_frames=4, num_tokens=18, num_heads=2, head_dim=16)


def test_errors_too_large_or_nan_are_faults():
    exact = {"output": torch.ones(4, dtype=torch.float64)}
    assert relative_errors({"output": torch.full((4,), 1.5)}, exact) == {"output": 0.5}
    poisoned = relative_errors({"output": torch.tensor([1.0, float("nan"), 1, 1])}, exact)
    assert "relative error of inf" in fault(poisoned, torch.bfloat16)
    assert fault({"output": 1e-3, "key gradient": 2.9e-2}, torch.bfloat16) is None
    assert "key gradient" in fault({"output": 1e-3, "key gradient": 3.1e-2}, torch.bfloat16)


def attention(call, dtype, case=TINY):
    inputs = tuple(t.detach() for t in case.inputs(dtype))
    return Contender(call, [inputs], [torch.randn(inputs[0].shape).to(dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_results_are_held_to_the_computed_tolerance(dtype):
    plan, eager = TINY.plan, ways(TINY.plan)["eager"]

    def nearly(query, key, value):
        # An error that a peer may have.
        return eager(query, key, value) * (1 + passes.LARGEST_ERROR[dtype] / 2)

    found, forward, backward = checked(
        attention(eager, dtype), plan, dtype, True, BACKENDS["eager"]
    )
    assert (forward, backward) == (None, None)
    assert found.keys() == {"output", "query gradient", "key gradient", "value gradient"}
    assert checked(attention(nearly, dtype), plan, dtype)[1:] == (None, None)
    _, forward, _ = checked(attention(nearly, dtype), plan, dtype, True, BACKENDS["eager"])
    assert forward.startswith("wrong: output: ")


def test_a_wrong_gradient_forbids_backward_passes_alone():
    eager = ways(TINY.plan)["eager"]

    def detached(query, key, value):
        return eager(query, key.detach(), value) + 0 * key.sum()

    for arithmetic in (None, BACKENDS["eager"]):
        found = checked(
            attention(detached, torch.float32), TINY.plan, torch.float32, True, arithmetic
        )
        assert found[1] is None
        assert "key gradient" in found[2]
