"""Tables land in their blocks, and stale ones show."""

import json
from pathlib import Path
from statistics import median

import pytest

from bench import render
from bench.rows import write_rows
from tokenmix_ops import peers
from tokenmix_ops.modules import TokenMixAttention
from tokenmix_ops.peers import LAYER_TITLES, layers_on, time_layers

RESULTS = Path(__file__).parents[2] / "results"
TEXT = "before\n<!-- rendered: layer-cpu -->\nold\n<!-- end of rendered -->\nafter\n"


@pytest.fixture
def rows(monkeypatch):
    small = {"batch": 1, "num_frames": 4, "num_tokens": 10, "dim": 16}
    monkeypatch.setattr(peers, "LAYER_SHAPE", small)
    timings = time_layers(layers_on(TokenMixAttention(16, 2, 4)), **small, rounds=3)
    return peers.layer_rows(timings)


def test_a_table_is_rendered_into_its_block_and_a_stale_one_shows(rows, tmp_path):
    unmeasured = render.rendered(TEXT, tmp_path)
    assert unmeasured == TEXT.replace("old", "Not measured.")
    write_rows(tmp_path / "layer-cpu.jsonl", rows)
    measured = render.rendered(TEXT, tmp_path)
    assert render.rendered(measured, tmp_path) == measured
    assert measured.startswith("before\n")
    assert measured.endswith("\nafter\n")
    for name in LAYER_TITLES.values():
        assert f"| {name} |" in measured
    rows[0]["rounds_ms"] = [ms + 100 for ms in rows[0]["rounds_ms"]]
    write_rows(tmp_path / "layer-cpu.jsonl", rows)
    assert render.rendered(measured, tmp_path) != measured


def test_pages_are_filled_and_stale_ones_named(tmp_path):
    pages = [tmp_path / "one.md", tmp_path / "two.md"]
    for page in pages:
        page.write_text(TEXT)
    with pytest.raises(ValueError, match=r"one.md and .*two.md: differs from the rows in"):
        render.update(pages, tmp_path, check=True)
    assert pages[0].read_text() == TEXT
    render.update(pages, tmp_path)
    assert "Not measured." in pages[1].read_text()
    render.update(pages, tmp_path, check=True)


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


def test_headlines_are_the_ratios_of_the_rows(tmp_path):
    block = TEXT.replace("layer-cpu", "headlines")
    assert render.rendered(block, tmp_path) == block.replace("old", "Not measured.")
    for name in ("layer-cpu.jsonl", "rerank-cpu.jsonl"):
        (tmp_path / name).write_text((RESULTS / name).read_text())
    text = render.rendered(block, tmp_path)
    rows = [json.loads(line) for line in (RESULTS / "layer-cpu.jsonl").read_text().splitlines()]
    of_forward = {r["contender"]: r["rounds_ms"] for r in rows if r["pass"] == "forward"}
    pairs = zip(of_forward["spatial_sdpa"], of_forward["token_mixing_gain_off"], strict=True)
    ratio = median(slow / fast for slow, fast in pairs)
    assert f"| whole layer, forward, gain off | plain spatial, SDPA | {ratio:.2f} |" in text
    assert "No GPU has been measured yet." in text
    (tmp_path / "gpu-h200.jsonl").write_text("")
    assert "No GPU" not in render.rendered(block, tmp_path)
