"""What a CPU's result files say together."""

import pytest

from bench.rows import write_rows
from bench.tables.cpu import cpu_table
from bench.targets_cpu import CPU_TARGETS

ABOUT = {
    "device": "cpu",
    "hardware": "Some CPU, AVX512",
    "threads": 2,
    "torch": "2.13.0",
    "tokenmix_ops": "0.1.0",
    "commit": "0123456789",
    "date": "2026-11-27",
    "isa": "avx512",
}


def row(shape, of_pass, contender, ms, **more):
    times = {"median_ms": ms, "rounds_ms": [ms] * 4}
    about = {"part": "operator", "shape": shape, "pass": of_pass, "contender": contender}
    return {**ABOUT, **about, **times, "gflop": 2.0, **more}


@pytest.fixture
def folder(tmp_path):
    operator = [
        row("main", "forward", "cpu", 10.0),
        row("main", "forward", "eager", 25.0),
        row("main", "forward", "sdpa_flash_by_frame", 15.0),
        row("main", "forward", "product", 9.6),
        row("main", "forward", "own_products", 11.0),
        row("S = 577", "forward", "cpu", 100.0, gflop=16.0),
        row("S = 577", "forward", "product", 99.0, gflop=16.0),
        row("main, gain off", "forward + backward", "cpu", 10.0),
        row("main, gain off", "forward + backward", "eager", 14.0),
    ]
    layer = [
        row(None, "forward", name, ms, part="layer")
        for name, ms in (("token_mixing", 10.0), ("blip", 25.0), ("spatial_sdpa", 15.9))
    ]
    tower = [
        row("B = 1", "forward", name, ms, part="tower")
        for name, ms in (("transformers", 13.0), ("converted", 10.0))
    ]
    for name, rows in (("operator", operator), ("layer", layer), ("tower", tower)):
        write_rows(tmp_path / f"{name}-cpu.jsonl", rows)
    return tmp_path


def test_targets_are_judged_by_all_files(folder):
    table = cpu_table(folder).splitlines()
    assert table[0] == "| target, on Some CPU, AVX512 | measured | wanted | |"
    for line in (
        "| forward, S = 197: of the rate of a matrix product | 96% (96%–96%) | ≥ 95% | met |",
        "| forward, S = 577: of the rate of a matrix product | 99% (99%–99%) | ≥ 100% | short |",
        "| forward, S = 197: against the fastest eager way | 1.50× (1.50–1.50, flash, frame by "
        "frame) | ≥ 1.6× | short |",
        "| forward + backward, gain off, S = 197: against gather + SDPA | 1.40× (1.40–1.40, "
        "tokenmix_ops, eager) | ≥ 1.45× | short |",
        "| layer, forward: against BLIP's own | 2.50× (2.50–2.50) | ≥ 2× | met |",
        "| layer, forward: against plain SDPA | 1.59× (1.59–1.59) | ≥ 1.6× | short |",
        "| layer, forward: against the naive gather | not measured | ≥ 2.4× |  |",
        "| BLIP's tower, 1 × 8 frames, inference: converted against transformers' own | 1.30× "
        "(1.30–1.30) | ≥ 1.25× | met |",
    ):
        assert line in table
    shapes = next(line for line in table if line.startswith("| main | forward | 10 | 200 |"))
    assert shapes.startswith("| main | forward | 10 | 200 | 208 | 96% | 110% | 2.50× |")
    assert "kernel with avx512" in table[-1]
    assert len([line for line in table if " not measured " in line]) == len(CPU_TARGETS) - 7


def test_other_files_of_the_same_machine_have_a_table_of_their_own(folder):
    assert cpu_table(folder, "cpu-avx2") == ""
    write_rows(
        folder / "operator-cpu-avx2.jsonl", [row("main", "forward", "cpu", 1.0, forced_isa="avx2")]
    )
    assert "all contenders limited to AVX2" in cpu_table(folder, "cpu-avx2")


def test_no_table_is_of_two_machines(folder):
    rows = [row("B = 1", "forward", "converted", 10.0, hardware="Another CPU")]
    write_rows(folder / "tower-cpu.jsonl", rows)
    with pytest.raises(ValueError, match="of one machine, got Some CPU, AVX512 and Another CPU"):
        cpu_table(folder)
