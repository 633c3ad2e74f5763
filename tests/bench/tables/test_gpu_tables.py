"""What tables say of rows: figures, targets met and missed, what did not run."""

import pytest

from bench.tables.gpu import REHEARSED, gpu_table
from bench.tables.speed import operator_table

ABOUT = {
    "suite": "gpu",
    "hardware": "NVIDIA H200",
    "driver": "580.1",
    "cuda": "13.0",
    "cudnn": 91000,
    "torch": "2.11.0",
    "triton": "3.6.0",
    "tokenmix_ops": "0.1.0",
    "commit": "0123456789",
    "date": "2026-11-23",
    "tests": "passed",
}


def made_up(shape, of_pass, contender, rounds, part="operator", **more):
    about = {**ABOUT, "part": part, "shape": shape, "pass": of_pass, "contender": contender}
    sizes = {"batch": 64, "num_frames": 8, "num_tokens": 197, "num_heads": 12, "floor_ms": 0.09}
    timed = {"rounds_ms": rounds, "median_ms": sorted(rounds)[len(rounds) // 2]} if rounds else {}
    return {**about, **sizes, **timed, **more}


@pytest.fixture
def rows():
    layer = {"part": "layer", "shape": "layer, B = 64", "of_pass": "forward + backward"}
    host = {**ABOUT, "part": "host", "pass": "no autograd", "contender": "triton"}
    ceiling = {"dtype": "bfloat16", "tflops": 780.0, "terabytes_per_s": 4.3}
    return [
        {**ABOUT, "part": "ceilings", **ceiling},
        made_up("main", "forward", "triton", [0.1, 0.1, 0.1], extra_mb=4.84),
        made_up("main", "forward", "naive_gather", [2.0, 2.2, 1.8]),
        made_up("main", "forward", "flex", [0.14, 0.14, 0.14]),
        made_up("main", "forward", "sdpa_flash_by_frame", [0.16, 0.16, 0.16]),
        made_up("main", "forward", "sdpa_cudnn", [], reason="no engine for it"),
        made_up("main", "backward", "triton", [0.3, 0.3, 0.3], deterministic=True, extra_mb=155.0),
        made_up("main, gain off", "forward", "triton", [0.1, 0.1, 0.1]),
        made_up("main, gain off", "forward", "sdpa_flash", [0.3, 0.3, 0.3]),
        made_up("main, gain off", "forward", "sdpa_cudnn", [0.2, 0.2, 0.2]),
        made_up(**layer, contender="token_mixing", rounds=[1.0, 1.0, 1.0]),
        made_up(**layer, contender="spatial_sdpa", rounds=[1.6, 1.6, 1.6]),
        {**host, "median_us": 12.5},
    ]


def test_the_table_names_what_is_met_and_what_is_short(rows):
    table = gpu_table(rows)
    for line in (
        "| forward against the naive gather | 20.00× (18.00–22.00) | ≥ 15× | met |",
        "| forward against gather + FlexAttention | 1.40× (1.40–1.40) | ≥ 1.5× | short |",
        "| forward against gather + the best SDPA backend, gain off | 2.00× (2.00–2.00, cuDNN) | "
        "≥ 1.5× | met |",
        "| forward, fraction of the floor | 90% | ≥ 60% | met |",
        "| backward, fraction of the floor | 30% | ≥ 50% | short |",
        "| memory of a forward pass beyond inputs and results | 4.8 MB | a float32 for each query "
        "| met |",
        "| memory of a backward pass beyond inputs and results | 155.0 MB | a float32 for each "
        "query | short |",
        "| backward, twice over the same inputs | the same bits twice | the same bits | met |",
        "| host, one call without autograd | 12.5 µs | ≤ 15 µs | met |",
        "| forward against gather + scaled keys + the best SDPA backend | 1.60× (1.60–1.60, flash, "
        "frame by frame) | ≥ 1.5× | met |",
        "| main | forward | 0.1 | 90% |  | 20.00× | 1.60×, flash, frame by frame | 1.40× |  |",
        "- Not run: gather + SDPA, cuDNN (main): no engine for it",
    ):
        assert line in table.splitlines()
    assert "1.60× (1.60–1.60) | ≥ 1.5× | met" in table
    assert "| adjacent: forward against gather + the best SDPA backend | not measured |" in table
    assert table.startswith("| target, on NVIDIA H200 | measured | wanted | |")
    assert "| shape, on NVIDIA H200 | pass | Triton, ms |" in table
    assert "| one layer with its projections, on NVIDIA H200 | pass |" in table
    assert "780 TFLOP/s in bfloat16" in table
    assert "NVIDIA H200, driver 580.1, CUDA 13.0" in table


def test_a_rehearsal_claims_nothing(rows):
    table = gpu_table([{**row, "rehearsal": True} for row in rows])
    assert " met |" not in table
    assert " short |" not in table
    assert table.endswith(REHEARSED)
    assert "B = 64" not in REHEARSED


def test_the_operator_table_has_a_column_for_each_contender_that_ran(rows):
    timed = [row for row in rows if row["part"] == "operator"]
    table = operator_table(timed).splitlines()
    assert table[0].startswith("| shape | pass | tokenmix_ops, Triton | naive gather")
    assert table[2].startswith("| main | forward | 0.1 | 2 | 0.14 | 0.16 |")
    assert table[-1] == "- Not run: gather + SDPA, cuDNN (main): no engine for it"


def test_what_ran_in_one_pass_is_said_to_have_failed_in_the_other(rows):
    timed = [row for row in rows if row["part"] == "operator"]
    timed.append(made_up("main", "backward", "flex", [], reason="no gradients"))
    assert operator_table(timed).splitlines()[-1] == (
        "- Not run: gather + FlexAttention, compiled, backward (main): no gradients"
    )
