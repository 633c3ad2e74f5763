"""Tables land in their blocks, and stale ones show."""

import json
from pathlib import Path
from statistics import median

import pytest

from bench import render
from bench.rows import write_rows
from tokenmix_ops import peer_layers
from tokenmix_ops.modules import TokenMixAttention
from tokenmix_ops.peer_layers import LAYER_TITLES, layers_on, time_layers

RESULTS = Path(__file__).parents[2] / "results"
TEXT = "before\n<!-- rendered: layer-cpu -->\nold\n<!-- end of rendered -->\nafter\n"


@pytest.fixture
def rows(monkeypatch):
    small = {"batch": 1, "num_frames": 4, "num_tokens": 10, "dim": 16}
    monkeypatch.setattr(peer_layers, "LAYER_SHAPE", small)
    timings = time_layers(
        layers_on(TokenMixAttention(16, 2, 4), with_eager=True), **small, rounds=3
    )
    return peer_layers.layer_rows(timings)


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


def test_pages_are_filled_and_stale_ones_named(rows, tmp_path):
    pages = [tmp_path / "one.md", tmp_path / "two.md"]
    for page in pages:
        page.write_text(TEXT)
    write_rows(tmp_path / "layer-cpu.jsonl", rows)
    with pytest.raises(ValueError, match=r"one.md and .*two.md differ from the rows in"):
        render.update(pages, tmp_path, check=True)
    assert pages[0].read_text() == TEXT
    render.update(pages, tmp_path)
    assert "| plain spatial, SDPA |" in pages[1].read_text()
    render.update(pages, tmp_path, check=True)
    pages[0].write_text(TEXT)
    with pytest.raises(
        ValueError, match=r"one.md differs from .* the same command without --check"
    ):
        render.update(pages, tmp_path, check=True)


@pytest.mark.parametrize("check", [False, True])
def test_pages_lose_no_table_for_want_of_its_rows(tmp_path, check):
    one, two = tmp_path / "one.md", tmp_path / "two.md"
    headlines = TEXT.replace("layer-cpu", "headlines")
    one.write_text(TEXT.replace("old", "Not measured."))
    two.write_text(TEXT + headlines)
    write_rows(tmp_path / "gpu-h200.jsonl", gpu_rows("NVIDIA H200", 20.0))
    with pytest.raises(ValueError, match="no page was changed") as error:
        render.update([one, two], tmp_path, check)
    assert str(error.value).startswith(
        f"{tmp_path} lacks rows that the pages show: layer-cpu.jsonl ({two}), layer-cpu.jsonl and "
        f"rerank-cpu.jsonl ({two}); "
    )
    assert two.read_text() == TEXT + headlines
    with pytest.raises(ValueError, match=r"expected a folder of rows, got .*nowhere"):
        render.update([one], tmp_path / "nowhere", check)


def test_re_ranking_on_a_gpu_has_its_place_for_every_card(tmp_path):
    rows = [json.loads(line) for line in (RESULTS / "rerank-cpu.jsonl").read_text().splitlines()]
    cards = {"rerank-h100": "NVIDIA H100", "rerank-h200": "NVIDIA H200"}
    for name, hardware in cards.items():
        write_rows(tmp_path / f"{name}.jsonl", [{**row, "hardware": hardware} for row in rows])
        assert render.is_shown(RESULTS / f"{name}.jsonl", [RESULTS / "README.md"], RESULTS)
    table = render.rendered(TEXT.replace("layer-cpu", "rerank-*"), tmp_path)
    for hardware in cards.values():
        assert f"target ≥ 5×. {hardware}, PyTorch" in table


def test_a_file_is_shown_where_a_page_has_its_block(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(TEXT + TEXT.replace("layer-cpu", "rerank-*"))
    for name, shown in (("layer-cpu", True), ("layer-h200", False), ("rerank-h200", True)):
        file = tmp_path / f"{name}.jsonl"
        assert render.is_shown(file, [page], tmp_path) == shown
        assert not render.is_shown(file, [page], tmp_path / "other")


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
    assert "None of this has been measured on a GPU yet." in text


def gpu_rows(hardware, naive_ms, **more):
    """What a run on a card leaves of the main shape: one race, ours at a millisecond."""
    about = {"suite": "gpu", "device": "gpu", "hardware": hardware, "part": "operator"}
    about |= {
        "shape": "main",
        "pass": "forward",
        "batch": 64,
        "floor_ms": 0.5,
        "date": "2026-11-27",
    }
    about |= dict.fromkeys(("driver", "cuda", "cudnn", "torch", "triton"), "1.0")
    about |= {"tokenmix_ops": "0.1.0", "commit": "0123456789", **more}
    times = {"triton": 1.0, "naive_gather": naive_ms}
    return [
        {**about, "contender": name, "median_ms": ms, "rounds_ms": [ms]}
        for name, ms in times.items()
    ]


def test_the_column_of_a_cpu_has_the_operator_too(tmp_path):
    for name in ("layer-cpu.jsonl", "rerank-cpu.jsonl"):
        (tmp_path / name).write_text((RESULTS / name).read_text())
    about = {"part": "operator", "shape": "main", "pass": "forward", "hardware": "A CPU"}
    about |= {"device": "cpu", "batch": 2, "threads": 2, "gflop": 1.0, "torch": "2.13.0"}
    about |= {"tokenmix_ops": "0.1.0", "commit": "0123456789", "date": "2026-11-27"}
    rows = [
        {**about, "contender": name, "median_ms": ms, "rounds_ms": [ms]}
        for name, ms in (("cpu", 1.0), ("eager", 2.0), ("naive_gather", 3.0))
    ]
    write_rows(tmp_path / "operator-cpu.jsonl", rows)
    headlines = render.rendered(TEXT.replace("layer-cpu", "headlines"), tmp_path)
    assert "| operator, forward, gain 0.8 | naive gather | 3.00 |" in headlines
    assert "| whole layer, forward, gain off | plain spatial, SDPA | " in headlines
    assert " threads of A CPU, 2 videos, PyTorch 2.13.0, 2026-11-27; " in headlines


def test_the_targets_of_a_cpu_are_rendered_from_its_files(tmp_path):
    block = TEXT.replace("layer-cpu", "targets-cpu")
    assert render.rendered(block, tmp_path) == block.replace("old", "Not measured.")
    write_rows(
        tmp_path / "layer-cpu.jsonl",
        [json.loads(line) for line in (RESULTS / "layer-cpu.jsonl").read_text().splitlines()],
    )
    text = render.rendered(block, tmp_path)
    assert "| layer, forward: against plain SDPA | " in text
    assert "| forward, S = 197: of the rate of a matrix product | not measured |" in text


def test_every_card_has_its_tables_and_its_column_of_headlines(tmp_path):
    for name in ("layer-cpu.jsonl", "rerank-cpu.jsonl"):
        (tmp_path / name).write_text((RESULTS / name).read_text())
    write_rows(tmp_path / "gpu-h200.jsonl", gpu_rows("NVIDIA H200", 20.0))
    write_rows(tmp_path / "gpu-h100-80gb-hbm3.jsonl", gpu_rows("NVIDIA H100 80GB HBM3", 10.0))
    tables = render.rendered(TEXT.replace("layer-cpu", "gpu-*"), tmp_path)
    for hardware, times in (("NVIDIA H200", 20), ("NVIDIA H100 80GB HBM3", 10)):
        _, _, after = tables.partition(f"| target, on {hardware} |")
        assert f"against the naive gather | {times}.00× ({times}.00–{times}.00) |" in after[:200]
        assert f"| shape, on {hardware} | pass |" in tables
    headlines = render.rendered(TEXT.replace("layer-cpu", "headlines"), tmp_path)
    assert "| CPU, float32 | NVIDIA H100 80GB HBM3, bfloat16 | NVIDIA H200, bfloat16 |" in headlines
    assert "| operator, forward, gain 0.8 | naive gather |  | 10.00 | 20.00 |" in headlines
    assert "GPU: NVIDIA H200, 64 videos" in headlines
    assert "None of this" not in headlines


def test_a_card_without_figures_is_no_measured_one(tmp_path):
    for name in ("layer-cpu.jsonl", "rerank-cpu.jsonl"):
        (tmp_path / name).write_text((RESULTS / name).read_text())
    broken = [{**row, "reason": "out of memory"} for row in gpu_rows("NVIDIA H200", 20.0)]
    for row in broken:
        del row["median_ms"], row["rounds_ms"]
    write_rows(tmp_path / "gpu-h200.jsonl", broken)
    headlines = render.rendered(TEXT.replace("layer-cpu", "headlines"), tmp_path)
    assert "None of this has been measured on a GPU yet." in headlines
    assert "H200" not in headlines
    assert "(main): out of memory" in render.rendered(TEXT.replace("layer-cpu", "gpu-*"), tmp_path)


def test_no_ratio_is_of_two_cards(tmp_path):
    mixed = gpu_rows("NVIDIA H200", 20.0)[:1] + gpu_rows("NVIDIA H100 80GB HBM3", 10.0)[1:]
    write_rows(tmp_path / "gpu-h200.jsonl", mixed)
    with pytest.raises(ValueError, match="of one machine, got NVIDIA H200 and NVIDIA H100 80GB"):
        render.rendered(TEXT.replace("layer-cpu", "gpu-*"), tmp_path)


def test_a_block_of_all_gpus_leaves_the_cpu_out(rows, tmp_path):
    write_rows(tmp_path / "layer-cpu.jsonl", rows)
    block = TEXT.replace("layer-cpu", "layer-*")
    assert render.rendered(block, tmp_path) == block.replace("old", "Not measured.")
    write_rows(tmp_path / "layer-h200.jsonl", [{**row, "device": "h200"} for row in rows])
    assert "| plain spatial, SDPA |" in render.rendered(block, tmp_path)
