"""Fine-tuning is timed, and a run that fails says why."""

import gc

import pytest
import torch

from bench import rows as files
from bench.__main__ import main
from bench.tables.tuning import (
    FROZEN_PATCHES,
    PAPER_GB,
    TOKEN_MIXING,
    training_table,
)
from tokenmix_ops.timing import HostClock

pytest.importorskip("transformers")
from bench import training
from bench.training import Run, Size, all_runs, heat_rows, heats

WIDTH = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


TINY = Size(
    batch=2,
    num_frames=3,
    image_size=32,
    length=6,
    vision={**WIDTH, "num_hidden_layers": 4, "patch_size": 8},
    text={**WIDTH, "intermediate_size": 64, "vocab_size": 110, "encoder_hidden_size": 32},
)


def test_every_tuning_is_in_both_types_and_no_run_twice():
    runs = all_runs()
    assert len(set(runs)) == len(runs)
    for name in training.TUNINGS:
        assert {run.dtype for run in runs if run.name == name} == {torch.bfloat16, torch.float32}
    published = {run.name for run in runs if run.way == "published"}
    assert published >= PAPER_GB.keys()
    timed = [run for heat in heats("cuda").values() for run in heat]
    assert sorted(map(str, timed)) == sorted(map(str, runs))


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(training, "SIZES", {"cpu": TINY})
    monkeypatch.setattr(training, "FEWEST_ROUNDS", 2)
    monkeypatch.setattr(training, "MOST_ROUNDS", 2)
    # Garbage is collected after each run: not among all that was imported.
    gc.freeze()
    yield
    gc.unfreeze()


def test_every_tuning_trains(hasty):
    pytest.importorskip("peft")
    runs = [Run(name, torch.float32) for name in training.TUNINGS]
    rows = heat_rows("all", runs, TINY, HostClock(), "cpu", 0.0)
    assert [row["run"] for row in rows] == list(training.TUNINGS)
    assert [row["reason"] for row in rows if "reason" in row] == []
    assert all(row["steps_per_s"] > 0 for row in rows)
    updated = {row["run"]: row["updated"] for row in rows}
    assert updated["token_mixing (F)"] == updated["spatial (F)"] < updated["full"]
    assert updated[FROZEN_PATCHES] < updated[TOKEN_MIXING]


def test_a_run_that_fails_says_why_and_the_others_go_on(hasty, monkeypatch):
    real = training.build

    def build_or_fail(run, size):
        if run.way == "published":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return real(run, size)

    monkeypatch.setattr(training, "build", build_or_fail)
    runs = [Run(TOKEN_MIXING, torch.float32, way) for way in ("published", "tokenmix_ops")]
    failed, done = heat_rows("targets", runs, TINY, HostClock(), "cpu", 0.0)
    assert failed["reason"] == "out of memory"
    assert "rounds_ms" not in failed
    assert len(done["rounds_ms"]) == 2


def test_the_command_writes_rows_and_prints_their_table(hasty, tmp_path, capsys):
    main(["training", "--device", "cpu", "--results", str(tmp_path), "--commit", "0123456789"])
    rows = files.read_rows(tmp_path / "training-cpu.jsonl")
    assert len(rows) == 5
    assert {row["commit"] for row in rows} == {"0123456789"}
    table = training_table(rows)
    assert f"| {TOKEN_MIXING} against the authors' way in float32 |" in table
    assert "GiB" not in table
    assert table in capsys.readouterr().out
