"""The compiler makes sound kernels of the launch configurations that are shipped, with no GPU."""

import dataclasses
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import aot, arguments, sass
from bench import rows as files
from bench.tables.compiler import aot_table, loops_table
from tokenmix_ops.backends.triton import configs

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

SOUND = {
    "kernel": "bwd_key",
    "keys": "strided",
    "architecture": "sm_90",
    "dtype": "bfloat16",
    "head_dim": 64,
    "shared": 50_000,
    "tensor_memory": 0,
    "registers": 200,
    "stack": 0,
    "programs_per_sm": 2,
    "instructions": {**dict.fromkeys(aot.COUNTED, 0), "HGMMA": 16, "MUFU.EX2": 32, "STG": 16},
    "triton": "3.9.0",
    "tokenmix_ops": "0.1.0",
    "commit": "unknown",
    "date": "2026-01-01",
}


def changed(instructions=None, **entries):
    return {**SOUND, **entries, "instructions": {**SOUND["instructions"], **(instructions or {})}}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program's exit status and what it wrote, on a machine where kernels are interpreted.

    For one architecture, dtype and head_dim: what the interpreter accepts and compilers refuse.
    """
    return run_program(
        tmp_path_factory.mktemp("aot"),
        *("--architectures", "sm_90", "--dtypes", "bfloat16", "--head-dims", "64"),
    )


ROOT = Path(aot.__file__).parent.parent


def run_program(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "bench", "aot", *arguments, "--results", str(folder)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    return done, files.read_rows(folder / "aot.jsonl")


KERNELS = {"fwd_resident", "fwd_streamed", "bwd_resident", "bwd_query", "bwd_key"}


@pytest.mark.interfaces
@needs_triton
def test_every_kernel_compiles_and_passes_the_check(program):
    done, rows = program
    assert aot.problems(rows) == []
    assert done.returncode == 0, done.stderr
    assert {(row["architecture"], row["dtype"], row["head_dim"]) for row in rows} == {
        ("sm_90", "bfloat16", 64)
    }
    assert {row["keys"] for row in rows} == set(aot.KEYS)
    assert {row["kernel"] for row in rows} == KERNELS


@pytest.mark.interfaces
@needs_triton
def test_rows_and_table_tell_what_came_out(program):
    done, rows = program
    for row in rows:
        assert {"BLOCK_M", "num_warps", "num_stages", "maxnreg", "commit", "triton"} <= row.keys()
        assert 16 < row["registers"] <= 255
        assert row["programs_per_sm"] >= 1
        loop = row["loop"]
        assert loop["instructions"] > loop["products"] >= loop["product_waits"] > 0
        # Only for keys by token does the number of turns depend on a table.
        assert ("predicted_us" in row) == ((row["kernel"], row["keys"]) != ("bwd_key", "table"))
        if "predicted_us" in row:
            assert row["predicted_us"] > row["floor_us"] > 0
            assert row["cycles_per_tile"] > 0
            assert all(
                0 <= share <= 1 for name in ("busy", "waits") for share in row[name].values()
            )
    table = aot_table(rows)
    assert table in done.stdout
    for kernel in {row["kernel"] for row in rows}:
        assert f"| {kernel} |" in table


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles_for_every_architecture_and_dtype(tmp_path):
    _, rows = run_program(tmp_path)
    assert aot.problems(rows) == []
    assert {row["architecture"] for row in rows} == set(aot.SHIPPED)
    assert {row["dtype"] for row in rows} == set(aot.DTYPES)
    assert {row["kernel"] for row in rows} == KERNELS


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (changed({"LDL": 2, "STL": 1}, stack=136), "spills: 136 bytes of stack, 2 loads, 1 stores"),
        (changed({"HGMMA": 0, "HMMA": 64}), "has no HGMMA"),
        (changed(architecture="sm_80"), "has no HMMA"),
        (changed(architecture="sm_100"), "has no UTCHMMA"),
        (changed({"MUFU.EX2": 0}), "is empty: 0 exponentials, 16 stores"),
        (changed({"STG": 0}), "is empty: 32 exponentials, 0 stores"),
        (changed(shared=250_000), "takes 250000 bytes of shared memory of 232448"),
        (changed(tensor_memory=704), "takes 704 columns of tensor memory of 512"),
        (changed(error="out of luck"), "does not compile: out of luck"),
    ],
)
def test_the_check_names_what_is_wrong(row, problem):
    case = f"bwd_key, strided keys, {row['architecture']}, bfloat16, head_dim 64"
    assert aot.problems([SOUND, row]) == [f"{case}: {problem}"]


@pytest.mark.parametrize(
    "row",
    [
        SOUND,
        changed(head_dim=128, stack=136),
        changed({"LDL": 2, "STL": 1}, stack=128),
        changed({"HGMMA": 0, "FFMA": 900}, dtype="float32"),
        changed({"HMMA": 64}, architecture="sm_86"),
    ],
)
def test_the_check_passes_what_is_sound(row):
    assert aot.problems([row]) == []


def test_dtypes_that_come_out_equal_share_a_line():
    rows = [changed(dtype=dtype) for dtype in ("float16", "bfloat16")]
    assert "| bwd_key | strided | 64 | float16, bfloat16 | 200 / 49 / 0 / 2 / 16 HGMMA |" in (
        aot_table(rows)
    )
    rows[1] = changed(registers=201)
    assert "| float16 | 200 / 49 / 0 / 2 / 16 HGMMA |" in aot_table(rows)


def test_a_kernel_that_does_not_compile_shows_in_the_table():
    row = {**SOUND, "error": "out of luck"}
    del row["instructions"]
    assert "| does not compile |" in aot_table([row])


MODELLED = {
    **{"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2, "maxnreg": 168},
    "loop": {"instructions": 800, **dict.fromkeys(sass.COUNTED, 7)},
    **{"predicted_us": 412.3, "floor_us": 133.2, "cycles_per_tile": 3210},
    "busy": {"issue": 0.3, "tensor": 0.5, "float": 0.1},
    "waits": {"global": 0.3, "barrier": 0.2},
}


def test_what_the_model_says_stands_below_the_compilers_report():
    assert loops_table([changed(**MODELLED)]) in aot_table([changed(**MODELLED)])
    table = loops_table([changed(**MODELLED)])
    assert (
        "| bwd_key | strided | 64 | sm_90 | 32 × 128, 8 warps, 2 stages, 168 registers |" in table
    )
    assert "| 3210 | tensor 50%, issue 30% | global 30%, barrier 20% | 412 | 133 |" in table


def test_a_variant_that_does_not_compile_shows_beside_the_others():
    row = {**changed(**MODELLED), "error": "out of luck", "maxnreg": None}
    assert "| 32 × 128, 8 warps, 2 stages | does not compile: out of luck |" in (loops_table([row]))


def test_variants_of_a_case_stand_together_the_fastest_first():
    rows = [
        changed(dtype=dtype, **time)
        for time in ({}, {"predicted_us": 2.0}, {"predicted_us": 1.0})
        for dtype in ("float16", "bfloat16")
    ]
    ordered = sorted(rows, key=aot.fastest_first)
    assert [(row["dtype"], row.get("predicted_us")) for row in ordered] == [
        (dtype, time) for dtype in ("bfloat16", "float16") for time in (1.0, 2.0, None)
    ]


@pytest.mark.parametrize(
    ("architecture", "taken", "programs"),
    [
        # 216 registers a thread, as they are handed out: two warps in each quarter of an SM.
        ("sm_90", {"registers": 213, "shared": 60 * 1024, "num_warps": 4}, 2),
        ("sm_90", {"registers": 168, "shared": 60 * 1024, "num_warps": 4}, 3),
        ("sm_90", {"registers": 169, "shared": 60 * 1024, "num_warps": 4}, 2),
        # Shared memory: 228 KB, of which every program takes 1 KB more than it asks for.
        ("sm_90", {"registers": 100, "shared": 75 * 1024, "num_warps": 4}, 3),
        ("sm_90", {"registers": 100, "shared": 75 * 1024 + 1, "num_warps": 4}, 2),
        ("sm_90", {"registers": 255, "shared": 88 * 1024, "num_warps": 8}, 1),
        ("sm_80", {"registers": 100, "shared": 81 * 1024, "num_warps": 4}, 2),
        ("sm_90", {"registers": 16, "shared": 0, "num_warps": 4}, 16),
        ("sm_86", {"registers": 16, "shared": 0, "num_warps": 4}, 12),
        ("sm_86", {"registers": 16, "shared": 0, "num_warps": 1}, 16),
        ("sm_100", {"registers": 64, "shared": 0, "num_warps": 4, "tensor_memory": 256}, 2),
        ("sm_90", {"registers": 255, "shared": 0, "num_warps": 16}, 0),
    ],
)
def test_programs_fit_an_sm_by_what_they_take(architecture, taken, programs):
    assert aot.ARCHITECTURES[architecture].programs_per_sm(**taken) == programs


def test_choices_of_the_command_are_those_of_the_program():
    assert tuple(aot.KEYS) == arguments.KEYS
    assert set(aot.PRODUCTS) == set(arguments.KERNELS) == KERNELS
    assert set(arguments.SETTINGS) < {field.name for field in dataclasses.fields(configs.Config)}


@needs_triton
def test_variants_are_compiled_and_nothing_is_written(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench", "aot", "--results", str(tmp_path)),
            *("--architectures", "sm_90", "--dtypes", "bfloat16", "--head-dims", "64"),
            *("--kernels", "fwd_resident", "--keys", "selected"),
            *("--set", "num_stages=1,3", "BLOCK_M=64,48"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "64 × 256, 4 warps, 1 stage, 168 registers | 168 |" in done.stdout
    assert "64 × 256, 4 warps, 3 stages, 168 registers | 168 |" in done.stdout
    assert "48 × 256, 4 warps, 3 stages, 168 registers | does not compile: " in done.stdout
    assert done.stderr.splitlines()[-1] == "bench aot: 2 of 4 variants do not compile"
    assert done.returncode == 1
    assert not list(tmp_path.iterdir())


def test_the_table_of_variants_says_which_triton_compiled_them():
    assert "Compiled by Triton 3.9.0." in loops_table([changed(**MODELLED)])


def test_a_selection_without_kernels_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="bench aot: no kernel to compile"):
        command.main(
            ["aot", "--kernels", "bwd_resident", "--keys", "table", "--results", str(tmp_path)]
        )


def test_a_part_does_not_replace_a_file_of_more(tmp_path):
    every = aot.all_cases()
    path = tmp_path / "aot.jsonl"
    assert aot.left_out(path, every[:1]) == 0
    files.write_rows(path, [dataclasses.asdict(case) for case in every])
    assert aot.left_out(path, every[:1]) == len(every) - 1
    assert aot.left_out(path, every) == 0
    before = path.read_text()
    with pytest.raises(SystemExit, match=rf"would lose .*kernels: {len(every) - 1}\).*--results"):
        command.main(
            [
                *("aot", "--results", str(tmp_path), "--architectures", "sm_90"),
                *("--kernels", "fwd_resident", "--keys", "selected"),
            ]
        )
    assert path.read_text() == before
    files.write_rows(path, [dataclasses.asdict(case) for case in every[:1]])
    assert aot.left_out(path, every[:1]) == 0


@pytest.mark.parametrize("path", sorted(configs.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_configurations_serve_every_call(path):
    architecture = configs.load(path.stem)
    assert architecture.source
    for bits in (16, 32):
        for head_dim in range(1, 257):
            for kernel in ("fwd_streamed", "bwd_query", "bwd_key"):
                assert architecture.find(kernel, bits, head_dim, 10**6) is not None
    for config in architecture.configs:
        for size in (config.BLOCK_M, config.BLOCK_N, 16 * config.num_warps):
            assert size >= 16
            assert size & (size - 1) == 0
