"""Fine-tuning's memory and speed: the authors' way, the meter, the command, and the tables."""

import gc
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import dropout, scaled_dot_product_attention, softmax

from tokenmix_ops.bench import render, training_table
from tokenmix_ops.bench.measure import HostClock
from tokenmix_ops.bench.training_table import (
    FROZEN_PATCHES,
    KINDS,
    PAPER_GB,
    TOKEN_MIXING,
    memory_table,
    out_of_order,
    rank_correlation,
)

pytest.importorskip("transformers")
from tokenmix_ops.bench import training, training_memory
from tokenmix_ops.bench.published import as_published
from tokenmix_ops.bench.training import Run, Size, Training, all_runs, build, heat_rows, heats
from tokenmix_ops.bench.training_memory import AsOnCuda, MemoryMeter, peak_memory

WIDTH = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
TINY = Size(
    batch=2,
    num_frames=3,
    image_size=32,
    length=6,
    vision={**WIDTH, "num_hidden_layers": 4, "patch_size": 8},
    text={**WIDTH, "intermediate_size": 64, "vocab_size": 110, "encoder_hidden_size": 32},
)


def loss_and_gradients(model, batch):
    loss = model(*batch)
    updated = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, updated, materialize_grads=True)]


@pytest.mark.interfaces
@pytest.mark.parametrize("name", [TOKEN_MIXING, "full", "dual_attention", "st_adapter", "bitfit"])
def test_the_authors_way_computes_the_same(name):
    torch.manual_seed(0)
    run = Run(name, torch.float32)
    model = build(run, TINY)
    batch = Training(model, run, TINY).batch
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    ours = loss_and_gradients(model, batch)
    parameters = list(model.parameters())
    theirs = loss_and_gradients(as_published(model), batch)
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    assert not any("Converted" in type(m).__name__ for m in model.modules())
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6


def test_a_mixing_that_was_not_published_is_refused():
    model = build(Run("spatial (P)", torch.float32), TINY)
    model.encoder.layers[0].self_attn.mixing = type(
        model.encoder.layers[0].self_attn.mixing
    ).joint()
    with pytest.raises(ValueError, match="published no way to compute"):
        as_published(model)


@pytest.mark.interfaces
def test_the_meter_counts_storages_while_they_live():
    with FakeTensorMode(), MemoryMeter() as meter:
        kept = torch.empty(1024)
        view = kept.view(32, 32)[:16]
        assert meter.live == {"activations": 4096}
        meter.making = "temporary"
        small = torch.empty(3)
        assert meter.live == {"activations": 4096, "temporary": 512}
        del kept
        assert meter.live["activations"] == 4096
        del view, small
        gc.collect()
        assert meter.live.total() == 0
        assert meter.peak == {"activations": 4096, "temporary": 512}
        meter.restart()
        made = torch.empty(256)
        meter.mark(made, "gradients")
        assert meter.live == {"gradients": 1024, "activations": 0, "temporary": 0}
        assert meter.peak.total() == 1024


def kept_by(run):
    """Bytes that live after a forward pass whose graph is kept."""
    with FakeTensorMode(), MemoryMeter() as meter, AsOnCuda():
        tokens = torch.empty(4, 8, 32, 16, requires_grad=True)
        before = meter.live.total()
        output = run(tokens)
        assert output.requires_grad
        return meter.live.total() - before


@pytest.mark.interfaces
def test_a_graph_keeps_what_it_keeps_on_a_gpu():
    tokens, rows = 4 * 8 * 32 * 16, 4 * 8 * 32

    def attend(tokens):
        return scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.1)

    # The output and a float32 for each query: no weights [32, 32], dropout or not.
    assert kept_by(attend) == 4 * tokens + 4 * rows
    # The output and a mask of bytes.
    assert kept_by(lambda t: dropout(t, 0.1)) == 4 * tokens + tokens
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_by(lambda t: softmax(t.bfloat16(), dim=-1)) == (4 + 2) * tokens - 2 * tokens
        # Three copies of the tokens in bfloat16, the output, a float32 for each query.
        assert kept_by(attend) == 2 * 4 * tokens + 4 * rows


@pytest.mark.interfaces
def test_attention_and_dropout_as_on_a_gpu_are_attention_and_dropout():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 8, 16)
    plain = scaled_dot_product_attention(query, key, value, scale=0.3)
    with AsOnCuda():
        fused = scaled_dot_product_attention(query, key, value, scale=0.3)
        dropped = dropout(torch.ones(10_000), 0.25)
        assert torch.equal(dropout(query, 0.25, training=False), query)
    assert torch.allclose(fused, plain, atol=1e-6)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)


WIDE = replace(
    TINY,
    vision={**TINY.vision, "hidden_size": 128},
    text={**TINY.text, "hidden_size": 128, "encoder_hidden_size": 128},
)


def peak(name, dtype=torch.float32, way="tokenmix_ops", size=WIDE):
    return peak_memory(Run(name, dtype, way), size)[0]


@pytest.mark.filterwarnings("ignore:Module is None")
def test_the_peak_agrees_with_pytorchs_tracker():
    # Which takes no frozen parameters, and whose hooks would change what a mixing layer does.
    from torch.distributed._tools.mem_tracker import MemTracker

    run = Run("spatial (F)", torch.float32)
    with torch.device("meta"):
        model = build(run, WIDE)
    with FakeTensorMode():
        training_memory._make_fake(model)
        made = Training(model, run, WIDE)
        tracker = MemTracker()
        tracker.track_external(made.model, made.optimizer, *made.batch)
        with tracker:
            for _ in range(2):
                tracker.reset_mod_stats()
                with AsOnCuda():
                    loss = made.loss()
                loss.backward()
                del loss
                made.optimizer.step()
                made.optimizer.zero_grad()
        (theirs,) = tracker.get_tracker_snapshot("peak").values()
    found = peak("spatial (F)")
    assert found.total() == pytest.approx(theirs["Total"], rel=0.02)


@pytest.mark.interfaces
def test_what_is_frozen_and_fused_costs_less():
    size = replace(TINY, batch=8, image_size=64)
    whole, frozen = peak(TOKEN_MIXING, size=size), peak(FROZEN_PATCHES, size=size)
    assert frozen["activations"] < whole["activations"]
    assert whole.total() < peak(TOKEN_MIXING, way="published", size=size).total()
    assert peak(TOKEN_MIXING, torch.bfloat16, size=size).total() < whole.total()
    assert whole["parameters"] == frozen["parameters"]
    assert whole.keys() <= set(KINDS)


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


def test_the_command_writes_rows_and_the_readme_beside_them(hasty, tmp_path, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text("<!-- rendered: training-cpu -->\nNot measured.\n<!-- end of rendered -->\n")
    training.main(["--device", "cpu", "--out", str(results), "--commit", "0123456789"])
    rows = render.read_rows(results / "training-cpu.jsonl")
    assert len(rows) == 5
    assert {row["commit"] for row in rows} == {"0123456789"}
    table = readme.read_text()
    assert f"| {TOKEN_MIXING} against the authors' way in float32 |" in table
    assert "GiB" not in table
    assert table.split("\n", 1)[1].rsplit("\n", 2)[0] in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA GPU")
def test_without_a_gpu_the_command_says_so(tmp_path):
    with pytest.raises(SystemExit, match="has no CUDA GPU; take --device cpu"):
        training.main(["--out", str(tmp_path)])


def test_the_memory_command_writes_rows_and_the_readme(monkeypatch, tmp_path, capsys):
    runs = [Run(TOKEN_MIXING, torch.bfloat16), Run(FROZEN_PATCHES, torch.float32)]
    monkeypatch.setattr(training_memory, "all_runs", lambda: runs)
    monkeypatch.setattr(training_memory, "Size", lambda: TINY)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- rendered: memory-fake -->\nNot measured.\n<!-- end of rendered -->\n")
    training_memory.main(["--results", str(tmp_path), "--readme", str(readme)])
    assert "Computed with fake tensors, not measured on a GPU" in readme.read_text()
    assert len(render.read_rows(tmp_path / "memory-fake.jsonl")) == 2


def test_orders_are_compared():
    paper = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert rank_correlation({"a": 5, "b": 6, "c": 7}, paper) == 1
    assert rank_correlation({"a": 7, "b": 6, "c": 5}, paper) == -1
    assert rank_correlation({"a": 6, "b": 5, "c": 7}, paper) == 0.5
    assert out_of_order({"a": 6, "b": 5, "c": 7}, paper) == [("a", "b")]


ABOUT = {
    **{"batch": 16, "num_frames": 8, "image_size": 224, "length": 40, "vision": {}, "text": {}},
    **{"torch": "2.11.0", "tokenmix_ops": "0.1.0", "commit": "0123456789", "date": "2026-11-23"},
    **{"device": "h200", "hardware": "NVIDIA H200", "driver": "580.1", "cuda": "13.0"},
}


def test_the_memory_table_stands_beside_the_papers():
    rows = [
        {
            **ABOUT,
            **{"run": name, "way": "published", "dtype": "float32", "updated": 1_500_000},
            "peak_gib": gb - 3 + 4 * (name == "bitfit"),
            **dict.fromkeys(KINDS, 1.0),
        }
        for name, gb in PAPER_GB.items()
    ]
    table = memory_table(rows).splitlines()
    assert "| full | 1.50 |  |  | 25.6 |  | 28.6 |" in table
    pairs = "bitfit and token_mixing (P), bitfit and adapter, bitfit and st_adapter"
    assert f"| authors' way, float32 | 0.79 | {pairs} |" in table


def test_the_table_of_a_gpu_names_what_is_met_and_what_is_short():
    def row(name, way, dtype, rounds, heat="targets"):
        figures = {"rounds_ms": rounds, "steps_per_s": 1e3 / rounds[0], "peak_gib": 12.34}
        return {**ABOUT, "run": name, "way": way, "dtype": dtype, "heat": heat, **figures}

    failed = row("full", "published", "float32", [1.0], "full")
    failed = {k: v for k, v in failed.items() if k not in ("rounds_ms", "steps_per_s", "peak_gib")}
    rows = [
        row(TOKEN_MIXING, "tokenmix_ops", "bfloat16", [100.0, 110.0, 100.0]),
        row(FROZEN_PATCHES, "tokenmix_ops", "bfloat16", [80.0, 80.0, 80.0]),
        row(TOKEN_MIXING, "published", "float32", [400.0, 440.0, 400.0]),
        {**failed, "reason": "out of memory"},
    ]
    table = training_table.training_table(rows).splitlines()
    for line in (
        f"| {TOKEN_MIXING} against the authors' way in float32 | 4.00× | 4.00–4.00 | ≥ 3×, met |",
        "| with the patch embedding frozen, against updating it | 1.25× | 1.25–1.38 | ≥ 2×, short "
        "|",
        f"| {TOKEN_MIXING} | 10 | 12.3 | 2.5 | 12.3 |",
        "| full |  |  | – | – |",
        "- Not run: full, published, float32: out of memory",
    ):
        assert line in table
