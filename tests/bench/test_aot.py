"""The compiler makes sound kernels of the launch configurations that are shipped, with no GPU."""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import aot, tables
from bench import rows as files
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


def serious(rows):
    """What `aot.problems` finds, but for spills of compilers older than the one that is locked:
    Triton 3.6 and 3.7 spill 24 bytes where 3.8 spills none, and CUDA builds of PyTorch pin them."""
    found = aot.problems(rows)
    old = tuple(map(int, version("triton").split(".")[:2])) < (3, 8)
    return [problem for problem in found if not (old and ": spills: " in problem)]


KERNELS = {"fwd_resident", "fwd_streamed", "bwd_resident", "bwd_query", "bwd_key"}


@pytest.mark.interfaces
@needs_triton
def test_every_kernel_compiles_and_passes_the_check(program):
    done, rows = program
    assert serious(rows) == []
    assert (done.returncode == 0) == (aot.problems(rows) == []), done.stderr
    assert {(row["architecture"], row["dtype"], row["head_dim"]) for row in rows} == {
        ("sm_90", "bfloat16", 64)
    }
    assert {row["keys"] for row in rows} == set(aot.KEYS)
    assert {row["kernel"] for row in rows} == KERNELS


@needs_triton
def test_rows_and_table_tell_what_came_out(program):
    done, rows = program
    for row in rows:
        assert {"BLOCK_M", "num_warps", "num_stages", "commit", "triton"} <= row.keys()
        assert 16 < row["registers"] <= 255
    table = tables.aot_table(rows)
    assert table in done.stdout
    for kernel in {row["kernel"] for row in rows}:
        assert f"| {kernel} |" in table


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles_for_every_architecture_and_dtype(tmp_path):
    _, rows = run_program(tmp_path)
    assert serious(rows) == []
    assert {row["architecture"] for row in rows} == set(aot.SHIPPED)
    assert {row["dtype"] for row in rows} == set(aot.DTYPES)
    assert {row["kernel"] for row in rows} == KERNELS


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (changed(stack=8), "spills: 8 bytes of stack, 0 loads, 0 stores"),
        (changed({"LDL": 2, "STL": 1}), "spills: 0 bytes of stack, 2 loads, 1 stores"),
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
        changed(head_dim=128, stack=8),
        changed({"HGMMA": 0, "FFMA": 900}, dtype="float32"),
        changed({"HMMA": 64}, architecture="sm_86"),
    ],
)
def test_the_check_passes_what_is_sound(row):
    assert aot.problems([row]) == []


def test_dtypes_that_come_out_equal_share_a_line():
    rows = [changed(dtype=dtype) for dtype in ("float16", "bfloat16")]
    assert "| bwd_key | strided | 64 | float16, bfloat16 | 200 / 49 / 0 / 16 HGMMA |" in (
        tables.aot_table(rows)
    )
    rows[1] = changed(registers=201)
    assert "| float16 | 200 / 49 / 0 / 16 HGMMA |" in tables.aot_table(rows)


def test_a_kernel_that_does_not_compile_shows_in_the_table():
    row = {**SOUND, "error": "out of luck"}
    del row["instructions"]
    assert "| does not compile |" in tables.aot_table([row])


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
