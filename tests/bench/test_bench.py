"""Benchmarks: contenders compute what they claim to, rows become tables, and stale tables show."""

import json

import pytest
import torch

from tokenmix_ops.bench import render, suites
from tokenmix_ops.bench.layers import NaiveGather, SpatialSDPA, blip_layer, contenders, mixing_layer
from tokenmix_ops.bench.measure import environment, ratio, time_side_by_side
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.modules import TokenMixAttention


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return TokenMixAttention(32, 4, 4, dtype=torch.float64)


@pytest.fixture
def tokens():
    return torch.randn(8, 18, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.interfaces
def test_contenders_of_one_kind_compute_the_same(weights, tokens):
    spatial = mixing_layer(weights, Mixing.spatial())(tokens)
    assert torch.allclose(SpatialSDPA(weights)(tokens), spatial, atol=1e-12)
    assert torch.allclose(blip_layer(weights, 32)(tokens), spatial, atol=1e-12)
    for gain in (0.8, 1.0):
        mixed = mixing_layer(weights, Mixing.released(cross_frame_gain=gain))(tokens)
        # Its logits are float32, as published.
        assert torch.allclose(NaiveGather(weights, gain)(tokens), mixed, atol=1e-5)
    assert not torch.allclose(mixed, spatial, atol=1e-2)


def test_all_contenders_share_their_weights():
    layers = contenders(32, 4, 4)
    assert list(layers) == list(render.TITLES)
    tokens = torch.randn(4, 18, 32)
    layers["token_mixing"](tokens).sum().backward()
    assert layers["naive_gather"].qkv.weight.grad is not None


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


@pytest.fixture
def rows(monkeypatch):
    small = {"batch": 1, "num_tokens": 20, "dim": 16}
    monkeypatch.setattr(suites, "contenders", lambda *sizes: contenders(16, 2, 8))
    real = suites.layer_timings
    monkeypatch.setattr(
        suites, "layer_timings", lambda layers, **sizes: real(layers, **{**sizes, **small})
    )
    return suites.layer_suite(rounds=3)


def test_rows_carry_all_that_a_figure_needs(rows):
    assert len(rows) == 10
    for row in rows:
        json.dumps(row)
        assert len(row["rounds_ms"]) == 3
        assert {"hardware", "threads", "torch", "commit", "date"} <= row.keys()
    assert environment()["torch"] == torch.__version__


def test_rows_survive_their_file_and_a_broken_line_is_named(rows, tmp_path):
    path = tmp_path / "results" / "layer-cpu.jsonl"
    render.write_rows(path, rows)
    assert render.read_rows(path) == rows
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ValueError, match=r"layer-cpu.jsonl, line 11: "):
        render.read_rows(path)


def test_a_table_is_rendered_into_its_block_and_a_stale_one_shows(rows, tmp_path):
    text = "before\n<!-- rendered: layer-cpu -->\nold\n<!-- end of rendered -->\nafter\n"
    unmeasured = render.rendered(text, tmp_path)
    assert unmeasured == text.replace("old", "Not measured.")
    render.write_rows(tmp_path / "layer-cpu.jsonl", rows)
    measured = render.rendered(text, tmp_path)
    assert render.rendered(measured, tmp_path) == measured
    assert measured.startswith("before\n")
    assert measured.endswith("\nafter\n")
    for name in render.TITLES.values():
        assert f"| {name} |" in measured
    rows[0]["median_ms"] += 100
    render.write_rows(tmp_path / "layer-cpu.jsonl", rows)
    assert render.rendered(measured, tmp_path) != measured


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- rendered: layer-cpu -->", "a rendered block has no end"),
        (
            "<!-- rendered: size-cpu --><!-- end of rendered -->",
            "unknown rendered block 'size-cpu'",
        ),
    ],
)
def test_broken_blocks_are_errors(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        render.rendered(text, tmp_path)
