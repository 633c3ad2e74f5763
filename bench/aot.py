"""What the compiler makes of every Triton kernel, for GPUs that need not be there.

Kernels are compiled ahead of time with the launch configurations that are shipped. Each gives a
row of data: registers, shared memory, spills, and counts of the instructions that matter.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from bench.rows import Row
from tokenmix_ops.timing import environment

if TYPE_CHECKING:
    from tokenmix_ops.backends.triton.layout import Layout

# What knows kernels is imported late, so that the rest works without Triton.


@dataclass(frozen=True)
class Target:
    """What a kernel has to fit."""

    matrix_instruction: str
    """That products of 16-bit numbers must become."""
    shared_limit: int
    """Bytes of shared memory that one program may take."""


TENSOR_MEMORY = 512
"""Columns that one program may take, where there is such a memory."""


ARCHITECTURES = {
    "sm_80": Target("HMMA", 163 * 1024),
    "sm_86": Target("HMMA", 99 * 1024),
    "sm_89": Target("HMMA", 99 * 1024),
    "sm_90": Target("HGMMA", 227 * 1024),
    "sm_100": Target("UTCHMMA", 227 * 1024),
    "sm_120": Target("HMMA", 99 * 1024),
}
SHIPPED = ("sm_80", "sm_90", "sm_100")
"""Those with a configuration file of their own."""

DTYPES = {"float16": (16, "fp16"), "bfloat16": (16, "bf16"), "float32": (32, "fp32")}
"""With their bits and their names in Triton."""

SHARED: dict[str, Any] = {"group_frames": 8, "num_keys": 204, "num_full_tokens": 1}
PER_FRAME: dict[str, Any] = {"group_frames": 1, "num_keys": 197, "num_full_tokens": -1}
KEYS: dict[str, dict[str, Any]] = {
    "strided": {**SHARED, "selected": False, "gains": True},
    "selected": {**SHARED, "selected": True, "gains": False},
    "table": {**PER_FRAME, "selected": False, "gains": True},
}
"""How kernels find keys: those of the mixing ``released``; the same ones, selected already, with no
gain; those of ``adjacent``."""

COUNTED = ("HMMA", "HGMMA", "UTCHMMA", "FFMA", "MUFU.EX2", "STG", "LDGSTS", "LDL", "STL")


@dataclass(frozen=True)
class Case:
    """One kernel to be compiled."""

    kernel: str
    keys: str
    architecture: str
    dtype: str
    head_dim: int

    def __str__(self) -> str:
        return (
            f"{self.kernel}, {self.keys} keys, {self.architecture}, {self.dtype}, "
            f"head_dim {self.head_dim}"
        )

    @property
    def layout(self) -> Layout:
        """Of the main shape: 8 frames of 197 tokens, 12 heads."""
        from tokenmix_ops.backends.triton.layout import Layout

        return Layout(
            num_frames=8,
            num_queries=197,
            num_tokens=197,
            num_prefix_tokens=1,
            num_heads=12,
            head_dim=self.head_dim,
            precision="ieee",
            upcast=False,
            wide=False,
            **KEYS[self.keys],
        )


def all_cases(
    architectures: Sequence[str] = SHIPPED,
    head_dims: Sequence[int] = (64, 128),
    dtypes: Sequence[str] = tuple(DTYPES),
) -> list[Case]:
    """Every kernel at every dtype and head_dim that it has a configuration for; the other ways to
    find keys in bfloat16 at head_dim 64 only."""
    from tokenmix_ops.backends.triton import configs, launch

    cases = [
        Case(kernel, keys, architecture, dtype, head_dim)
        for architecture in architectures
        for kernel in launch.KERNELS
        for keys in KEYS
        for dtype in dtypes
        for head_dim in head_dims
        if keys == "strided" or (dtype, head_dim) == ("bfloat16", 64)
    ]
    return [
        case
        for case in cases
        if not (case.kernel == "bwd_resident" and case.layout.by_token)
        and configs.load(case.architecture).find(
            case.kernel, DTYPES[case.dtype][0], case.head_dim, case.layout.num_keys
        )
    ]


def compile_all(
    cases: Sequence[Case], progress: Callable[[int, int], object] | None = None
) -> list[Row]:
    """A row for each case, in their order; compiled by as many processes as there are cores."""
    rows = []
    spawn = get_context("spawn")
    with _no_interpreter(), ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as workers:
        for row in workers.map(compile_case, cases):
            rows.append(row)
            if progress is not None:
                progress(len(rows), len(cases))
    return rows


@contextmanager
def _no_interpreter() -> Iterator[None]:
    """For processes that start inside: Triton reads this variable once, when PyTorch imports it."""
    value = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if value is not None:
            os.environ["TRITON_INTERPRET"] = value


def compile_case(case: Case) -> Row:
    """The row of a case; with "error" in place of figures if the compiler refuses it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tokenmix_ops.backends.triton import configs, launch

    bits, dtype = DTYPES[case.dtype]
    layout, kernel = case.layout, launch.KERNELS[case.kernel]
    config = configs.load(case.architecture).find(case.kernel, bits, case.head_dim, layout.num_keys)
    assert config is not None
    tiles = launch.tile_constants(kernel, layout, config)
    constants = {"L": layout, "NEGATIVE": False, **tiles}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    types = {
        name: "constexpr" if name in constants else _type_of(name, dtype)
        for name in kernel.arg_names
    }
    # As Triton finds them at run time: pointers are aligned, strides multiples of head_dim.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name.startswith("stride_")
    }
    known = environment()
    row = {
        **asdict(case),
        **tiles,
        **({"TILES": [astuple(tile) for tile in tiles["TILES"]]} if "TILES" in tiles else {}),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "triton": triton.__version__,
        **{name: known[name] for name in ("tokenmix_ops", "commit", "date")},
    }
    try:
        compiled = triton.compile(
            ASTSource(kernel, types, constants, aligned),
            target=GPUTarget("cuda", int(case.architecture.removeprefix("sm_")), 32),
            options={
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
                "enable_fp_fusion": True,
            },
        )
    except Exception as error:
        lines = str(error).strip().splitlines()
        return {**row, "error": lines[-1] if lines else repr(error)}
    metadata = compiled.metadata
    return {
        **row,
        "shared": metadata.shared,
        "tensor_memory": getattr(metadata, "tmem_size", None) or 0,
        **_disassembled(compiled.asm["cubin"]),
    }


def _type_of(name: str, dtype: str) -> str:
    """Triton's type of a kernel's argument."""
    if name.startswith("stride_") or name == "tiles_per_program":
        return "i32"
    if name in ("scale", "gain"):
        return "fp32"
    if name in ("lse", "delta"):
        return "*fp32"
    if name in ("key_index", "key_frame", "token_order", "use_start", "uses"):
        return "*i32"
    if name.split("_")[0] in ("query", "key", "value", "output"):
        return f"*{dtype}"
    raise ValueError(f"bench.aot does not know the type of the argument {name}")


def _disassembled(binary: bytes) -> dict[str, Any]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump tells no registers: {text[:200]!r}")
    instructions = {name: len(re.findall(rf"\b{re.escape(name)}\b", text)) for name in COUNTED}
    return {"registers": int(usage[1]), "stack": int(usage[2]), "instructions": instructions}


def problems(rows: Sequence[Row]) -> list[str]:
    """What must not be, in a line each.

    A kernel that does not compile, that takes more memory than there is, that came out empty (the
    compiler of sm_100 then says nothing), that spills at head_dim 64, or whose 16-bit products miss
    the matrix instruction of their architecture.
    """
    found = []
    for row in rows:
        target, counts = ARCHITECTURES[row["architecture"]], row.get("instructions", {})
        problem = None
        if "error" in row:
            problem = f"does not compile: {row['error']}"
        elif row["shared"] > target.shared_limit:
            problem = f"takes {row['shared']} bytes of shared memory of {target.shared_limit}"
        elif row["tensor_memory"] > TENSOR_MEMORY:
            problem = f"takes {row['tensor_memory']} columns of tensor memory of {TENSOR_MEMORY}"
        elif not (counts["MUFU.EX2"] and counts["STG"]):
            problem = f"is empty: {counts['MUFU.EX2']} exponentials, {counts['STG']} stores"
        elif DTYPES[row["dtype"]][0] == 16 and not counts[target.matrix_instruction]:
            problem = f"has no {target.matrix_instruction}"
        elif row["head_dim"] <= 64 and (row["stack"] or counts["LDL"] or counts["STL"]):
            problem = (
                f"spills: {row['stack']} bytes of stack, {counts['LDL']} loads, "
                f"{counts['STL']} stores"
            )
        if problem is not None:
            case = Case(*(row[name] for name in Case.__dataclass_fields__))
            found.append(f"{case}: {problem}")
    return found
