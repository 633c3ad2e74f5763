"""The memory meter, and the models it measures as if they were on a GPU."""

import gc
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import dropout, scaled_dot_product_attention, softmax

from bench import rows as files
from bench.__main__ import main
from bench.tables.tuning import (
    FROZEN_PATCHES,
    KINDS,
    TOKEN_MIXING,
)

pytest.importorskip("transformers")
from bench import memory, training
from bench.memory import AsOnCuda, MemoryMeter, peak_memory
from bench.training import Run, Size, Training, build

WIDTH = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


TINY = Size(
    batch=2,
    num_frames=3,
    image_size=32,
    length=6,
    vision={**WIDTH, "num_hidden_layers": 4, "patch_size": 8},
    text={**WIDTH, "intermediate_size": 64, "vocab_size": 110, "encoder_hidden_size": 32},
)


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
        memory._make_fake(model)
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


def test_the_memory_command_writes_rows_and_prints_their_table(monkeypatch, tmp_path, capsys):
    runs = [Run(TOKEN_MIXING, torch.bfloat16), Run(FROZEN_PATCHES, torch.float32)]
    monkeypatch.setattr(training, "all_runs", lambda: runs)
    monkeypatch.setattr(training, "Size", lambda: TINY)
    main(["memory", "--results", str(tmp_path)])
    assert "Computed with fake tensors, not measured on a GPU" in capsys.readouterr().out
    assert len(files.read_rows(tmp_path / "memory-fake.jsonl")) == 2
