"""What the tables of fine-tuning say: orders compared, targets met and missed."""

from bench.tables.tuning import (
    FROZEN_PATCHES,
    KINDS,
    PAPER_GB,
    TOKEN_MIXING,
    memory_table,
    out_of_order,
    rank_correlation,
    training_table,
)


def test_orders_are_compared():
    paper = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert rank_correlation({"a": 5, "b": 6, "c": 7}, paper) == 1
    assert rank_correlation({"a": 7, "b": 6, "c": 5}, paper) == -1
    assert rank_correlation({"a": 6, "b": 5, "c": 7}, paper) == 0.5
    assert out_of_order({"a": 6, "b": 5, "c": 7}, paper) == [("a", "b")]


FINE_TUNING = {
    **{"batch": 16, "num_frames": 8, "image_size": 224, "length": 40, "vision": {}, "text": {}},
    **{"torch": "2.11.0", "tokenmix_ops": "0.1.0", "commit": "0123456789", "date": "2026-11-23"},
    **{"device": "h200", "hardware": "NVIDIA H200", "driver": "580.1", "cuda": "13.0"},
}


def test_the_memory_table_stands_beside_the_papers():
    rows = [
        {
            **FINE_TUNING,
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
        return {**FINE_TUNING, "run": name, "way": way, "dtype": dtype, "heat": heat, **figures}

    failed = row("full", "published", "float32", [1.0], "full")
    failed = {k: v for k, v in failed.items() if k not in ("rounds_ms", "steps_per_s", "peak_gib")}
    rows = [
        row(TOKEN_MIXING, "tokenmix_ops", "bfloat16", [100.0, 110.0, 100.0]),
        row(FROZEN_PATCHES, "tokenmix_ops", "bfloat16", [80.0, 80.0, 80.0]),
        row(TOKEN_MIXING, "published", "float32", [400.0, 440.0, 400.0]),
        {**failed, "reason": "out of memory"},
    ]
    table = training_table(rows).splitlines()
    for line in (
        f"| {TOKEN_MIXING} against the authors' way in float32 | 4.00× | 4.00–4.00 | ≥ 3×, met |",
        "| with the patch embedding frozen, against updating it | 1.25× | 1.25–1.38 | ≥ 2×, short "
        "|",
        f"| {TOKEN_MIXING} | 10 | 12.3 | 2.5 | 12.3 |",
        "| ratio of steps per second on NVIDIA H200, pairs of each round |  | quartiles | target |",
        "| full |  |  | – | – |",
        "- Not run: full, published, float32: out of memory",
    ):
        assert line in table
