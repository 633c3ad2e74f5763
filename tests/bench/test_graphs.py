"""Replays stand for their contenders, one graph for each set of inputs."""

from contextlib import contextmanager

import pytest
import torch

from bench import graphs
from bench.graphs import REPLAY, captured, replays
from bench.passes import Contender, turn


def contender(call, number=3):
    sets = [(torch.full((2,), float(i)), torch.ones(2)) for i in range(number)]
    return Contender(call, sets, [torch.ones(2)] * number)


def test_each_set_of_inputs_has_its_replay_and_a_failure_its_reason():
    runs = []

    def capture(run):
        output = run()
        runs.append(output)
        return lambda: output

    def refuse(*tensors):
        raise RuntimeError("operation not permitted when stream is capturing")

    racers = {"sum": contender(torch.add), "moody": contender(refuse)}
    begun = []
    found, reasons = replays(racers, capture, lambda *what: begun.append(what))
    assert begun == [(name, REPLAY) for name in racers]
    assert reasons == {
        "moody": "no graph: RuntimeError: operation not permitted when stream is capturing"
    }
    assert len(runs) == 3
    run = turn(found["sum"], "forward")
    assert [float(run(number)()[0]) for number in range(5)] == [1, 2, 3, 1, 2]
    assert len(runs) == 3


def test_of_many_sets_only_the_first_have_graphs(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    found, _ = replays({"sum": contender(torch.add)}, lambda run: run)
    assert len(found["sum"].sets) == 2


def test_without_a_gpu_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, reasons = replays({"sum": contender(torch.add)})
    assert found == {}
    assert reasons == {"sum": "no graph: RuntimeError: CUDA graphs need a CUDA GPU"}


class Fake:
    """What `captured` uses of torch.cuda, without a GPU: notes what happens on which stream."""

    def __init__(self):
        self.notes, self.on, self.run = [], "main", None

    def Stream(self):
        return self

    def current_stream(self):
        return self

    def wait_stream(self, other):
        self.notes.append("wait")

    def CUDAGraph(self):
        return self

    def is_available(self):
        return True

    @contextmanager
    def stream(self, stream):
        self.on = "side"
        try:
            yield
        finally:
            self.on = "main"

    @contextmanager
    def graph(self, graph, stream):
        self.on = "capture"
        yield
        self.on = "side"

    def replay(self):
        self.notes.append("replay")


@pytest.fixture
def fake(monkeypatch):
    found = Fake()
    monkeypatch.setattr(torch, "cuda", found)
    return found


def test_a_run_is_captured_after_warm_up_on_a_side_stream(fake):
    output = torch.zeros(2)

    def run():
        fake.notes.append(fake.on)
        assert not torch.is_grad_enabled()
        return output

    replay = captured(run)
    assert fake.notes == ["wait", "side", "side", "side", "capture", "wait"]
    assert output.isnan().all(), "a replay that writes nothing must show"
    assert replay() is output
    assert fake.notes[-1] == "replay"


def test_a_failed_capture_leaves_its_stream(fake):
    def run():
        if fake.on == "capture":
            raise RuntimeError("not under capture")

    with pytest.raises(RuntimeError, match="not under capture"):
        captured(run)
    assert fake.on == "main"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a GPU")
def test_a_replay_computes_from_what_its_inputs_hold_now():
    numbers = torch.ones(4, device="cuda")
    replay = captured(lambda: 2 * numbers)
    numbers.fill_(3)
    assert replay().tolist() == [6.0] * 4
