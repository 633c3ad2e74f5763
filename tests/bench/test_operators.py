"""A shape becomes rows, a wrong contender is not timed, and the host is timed too."""

import json
import os
from dataclasses import replace

import pytest
import torch

import tokenmix_ops as tm
from bench import operators, passes
from bench.commands import in_its_own_process
from bench.floor import Ceilings
from bench.graphs import REPLAY, replays
from bench.operators import Shape, flex_fault, host_rows, operator_rows, timed_passes
from bench.passes import PASSES
from bench.tables.speed import host_table
from tokenmix_ops.peers import operators as ways
from tokenmix_ops.testing import Case
from tokenmix_ops.timing import HostClock, environment

# Where there is a GPU, the Triton backend runs there alone, and flash attention too.
ON_GPU = torch.cuda.is_available()


TINY = Case(tm.Mixing.released(), batch=2, num_frames=4, num_tokens=18, num_heads=2, head_dim=16)


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(passes, "FEWEST_ROUNDS", 2)
    monkeypatch.setattr(passes, "MOST_ROUNDS", 2)


RATES = Ceilings(1e12, 1e11, 1e10)


def test_a_shape_becomes_rows_and_a_wrong_contender_is_not_timed(hasty, monkeypatch):
    real = ways(TINY.plan, compiled=False)
    calls = {
        "triton": lambda q, k, v: 1.1 * real["eager"](q, k, v),
        "eager": real["eager"],
        "flex": real["flex"],
        "xformers": "xformers is not installed",
    }
    monkeypatch.setattr(operators, "operators", lambda plan, **options: calls)
    shape = Shape("tiny", TINY, torch.float32, selected=True)
    rows = operator_rows(shape, RATES, HostClock(), "cpu", 0.0)
    assert len(rows) == 3 * 4
    by_name = {(row["pass"], row["contender"]): row for row in rows}
    for of_pass in PASSES:
        assert "wrong: output: " in by_name[of_pass, "triton"]["reason"]
        assert by_name[of_pass, "xformers"]["reason"] == "xformers is not installed"
        eager = by_name[of_pass, "eager"]
        assert len(eager["rounds_ms"]) == 2
        assert eager["num_keys"] == 4 + 17
        assert max(eager["relative_error"].values()) < 1e-5
    assert "median_ms" in by_name["forward", "flex"]
    assert "backward on CPU" in by_name["backward", "flex"]["reason"]
    json.dumps(rows)


def test_a_contender_that_broke_a_process_is_left_out_from_the_pass_on(monkeypatch):
    real = ways(TINY.plan, compiled=False)
    calls = {name: real[name] for name in ("eager", "naive_gather", "spatial_sdpa")}
    monkeypatch.setattr(operators, "operators", lambda plan, **options: calls)
    refused = {"eager": ("backward", "it hung"), "spatial_sdpa": ("forward", "it crashed")}
    told = []
    found = timed_passes(
        Shape("tiny", TINY, torch.float32, selected=True),
        RATES,
        HostClock(),
        "cpu",
        0.0,
        1,
        refused,
        lambda *what: told.append(what),
    )
    forward, *others = found
    assert [row.get("reason") for row in forward] == [None, None, "it crashed"]
    for rows in others:
        assert [row.get("reason") for row in rows] == ["it hung", None, "it crashed"]
    assert told[:3] == [("eager", "forward"), *[("naive_gather", p) for p in PASSES[::2]]]
    assert told[3:6] == [(name, "forward") for name in ("eager", "naive_gather", "")]
    assert "spatial_sdpa" not in {name for name, _ in told}


def test_replays_are_checked_and_timed_beside_the_runs_that_they_repeat(hasty, monkeypatch):
    eager = ways(TINY.plan)["eager"]

    def moody(query, key, value):
        return eager(query, key, value)

    def silent(query, key, value):
        return eager(query, key, value)

    calls = {"eager": eager, "moody": moody, "silent": silent, "xformers": "not installed"}
    monkeypatch.setattr(operators, "operators", lambda plan, **options: calls)

    def capture(run):
        if run.func is moody:
            raise RuntimeError("not under capture")
        output = run()
        return lambda: output.zero_() if run.func is silent else output

    monkeypatch.setattr(operators, "replays", lambda racing, begin: replays(racing, capture, begin))
    shape = Shape("tiny", TINY, torch.float32, passes=("forward", REPLAY))
    rows = operator_rows(shape, RATES, HostClock(), "cpu", 0.0)
    runs, repeated = ({r["contender"]: r for r in rows if r["pass"] == p} for p in shape.passes)
    assert all("rounds_ms" in runs[name] for name in ("eager", "moody", "silent"))
    assert len(repeated["eager"]["rounds_ms"]) == 2
    assert repeated["eager"]["floor_ms"] == runs["eager"]["floor_ms"]
    assert repeated["moody"]["reason"] == "no graph: RuntimeError: not under capture"
    assert repeated["silent"]["reason"].startswith("no graph: RuntimeError: wrong: the output")
    assert repeated["xformers"]["reason"] == "not installed"
    json.dumps(rows)


@pytest.mark.skipif(ON_GPU, reason="Triton's interpreter computes this where there is no GPU")
def test_the_triton_backend_is_timed_and_its_bits_compared(hasty, monkeypatch):
    small = replace(TINY, num_tokens=6, num_heads=1)
    calls = {"triton": ways(small.plan)["triton"]}
    monkeypatch.setattr(operators, "operators", lambda plan, **options: calls)
    shape = Shape("tiny", small, torch.float32, passes=("backward",), selected=True)
    (row,) = operator_rows(shape, RATES, HostClock(), "cpu", 0.0)
    assert row["deterministic"] is True
    assert row["median_ms"] > 0


def test_the_host_becomes_rows(monkeypatch):
    monkeypatch.setattr(operators, "CALLS", 2)
    monkeypatch.setattr(operators, "REPEATS", 2)
    rows = host_rows(HostClock(), "cpu", backend="eager")
    assert {row["contender"] for row in rows} == {"eager", "sdpa"}
    assert all(len(row["rounds_us"]) == 2 for row in rows)
    assert "sdpa" in host_table([{**row, **environment()} for row in rows])


def test_flex_attention_runsin_its_own_process_or_says_why_not(monkeypatch):
    flex = ways(TINY.plan, compiled=False)["flex"]
    monkeypatch.setattr(operators, "operators", lambda plan, **options: {"flex": flex})
    shape = Shape("tiny", TINY, torch.float32)
    assert flex_fault(shape, torch.get_num_threads()) is None

    def broken(*tensors):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(operators, "operators", lambda plan, **options: {"flex": broken})
    assert flex_fault(shape, torch.get_num_threads()) == "RuntimeError: no compiler"


def die(shape, threads):
    os._exit(1)


def test_what_its_process_dies_of_is_a_reason():
    assert in_its_own_process(die, "a shape") == "its process died"
