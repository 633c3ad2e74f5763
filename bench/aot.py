"""What the compiler makes of every Triton kernel, for GPUs that need not be there.

Kernels are compiled ahead of time with the launch configurations that are shipped, or with others
to compare. Each gives a row of data: registers, shared memory, spills, programs that fit an SM,
counts of the instructions that matter, and the time that `bench.cycles` predicts.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import cycles, sass
from bench.rows import Row, read_rows
from bench.side_by_side import each
from tokenmix_ops.timing import environment

if TYPE_CHECKING:
    from tokenmix_ops.backends.triton.configs import Config
    from tokenmix_ops.backends.triton.layout import Layout

# What knows kernels is imported late, so that the rest works without Triton.


@dataclass(frozen=True)
class Target:
    """What a kernel has to fit: limits of CUDA's table of compute capabilities."""

    matrix_instruction: str
    """That products of 16-bit numbers must become."""
    shared_limit: int
    """Bytes of shared memory that one program may take."""
    warps: int
    """That an SM holds."""
    programs: int
    """That an SM holds."""

    def programs_per_sm(
        self, registers: int, shared: int, num_warps: int, tensor_memory: int = 0
    ) -> int:
        """How many programs that take so much fit an SM at a time."""
        # Each quarter of an SM has 16,384 registers and hands them out to warps in units of 256.
        each = 256 * -(-32 * registers // 256)
        limits = [self.programs, self.warps // num_warps, 4 * (16384 // each) // num_warps]
        # CUDA takes 1 KB of shared memory for itself in each program.
        limits.append((self.shared_limit + RESERVED) // (shared + RESERVED))
        if tensor_memory:
            limits.append(TENSOR_MEMORY // tensor_memory)
        return min(limits)


RESERVED = 1024
STACK_LIMIT = 128
"""Bytes of stack that a thread may take: a few spilled numbers cost less than the prefetch or the
program beside it that they pay for."""
TENSOR_MEMORY = 512
"""Columns of an SM, where there is such a memory."""


ARCHITECTURES = {
    "sm_80": Target("HMMA", 163 * 1024, 64, 32),
    "sm_86": Target("HMMA", 99 * 1024, 48, 16),
    "sm_89": Target("HMMA", 99 * 1024, 48, 24),
    "sm_90": Target("HGMMA", 227 * 1024, 64, 32),
    "sm_100": Target("UTCHMMA", 227 * 1024, 64, 32),
    "sm_120": Target("HMMA", 99 * 1024, 48, 24),
}
SHIPPED = ("sm_80", "sm_90", "sm_100")
"""Those with a configuration file of their own."""

DTYPES = {"float16": (16, "fp16"), "bfloat16": (16, "bf16"), "float32": (32, "fp32")}
"""With their bits and their names in Triton."""

SHARED: dict[str, Any] = {"group_frames": 8, "num_full_tokens": 1}
PER_FRAME: dict[str, Any] = {"group_frames": 1, "num_full_tokens": -1}
KEYS: dict[str, dict[str, Any]] = {
    "strided": {**SHARED, "num_keys": 204, "selected": False, "gains": True},
    "selected": {**SHARED, "num_keys": 204, "selected": True, "gains": False},
    "table": {**PER_FRAME, "num_keys": 197, "selected": False, "gains": True},
    "long": {**SHARED, "num_keys": 584, "selected": False, "gains": True},
}
"""How kernels find keys: those of the mixing ``released``; the same ones, selected already, with no
gain; those of ``adjacent``; those of ``released`` for images of 384 pixels."""
TOKENS = {"long": 577}
"""Of a frame; otherwise `SHORT`."""
SHORT = 197

PRODUCTS = {"fwd_resident": 2, "fwd_streamed": 2, "bwd_resident": 5, "bwd_query": 3, "bwd_key": 4}
"""Of queries with keys, in each kernel."""
BATCH = 64
"""Videos of the main shape, for which times are predicted."""

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
        """Of 8 frames and 12 heads."""
        from tokenmix_ops.backends.triton.layout import Layout

        num_tokens = TOKENS.get(self.keys, SHORT)
        return Layout(
            num_frames=8,
            num_queries=num_tokens,
            num_tokens=num_tokens,
            num_prefix_tokens=1,
            num_heads=12,
            head_dim=self.head_dim,
            precision="ieee",
            upcast=False,
            wide=False,
            alignment=gcd(16, self.head_dim * DTYPES[self.dtype][0] // 8),
            **KEYS[self.keys],
        )

    def shipped(self) -> Config | None:
        """The launch configuration that serves it, if there is one."""
        from tokenmix_ops.backends.triton import configs

        bits, num_keys = DTYPES[self.dtype][0], self.layout.num_keys
        return configs.load(self.architecture).find(self.kernel, bits, self.head_dim, num_keys)


def all_cases(
    architectures: Sequence[str] = SHIPPED,
    head_dims: Sequence[int] = (64, 128),
    dtypes: Sequence[str] = tuple(DTYPES),
    kernels: Sequence[str] = tuple(PRODUCTS),
    kinds_of_keys: Sequence[str] = tuple(KEYS),
) -> list[Case]:
    """Every kernel at every dtype and head_dim that it has a configuration for; the other ways to
    find keys in bfloat16 at head_dim 64 only."""
    cases = [
        Case(kernel, keys, architecture, dtype, head_dim)
        for architecture in architectures
        for kernel in kernels
        for keys in kinds_of_keys
        for dtype in dtypes
        for head_dim in head_dims
        if keys == "strided" or (dtype, head_dim) == ("bfloat16", 64)
    ]
    return [
        case
        for case in cases
        if not (case.kernel == "bwd_resident" and case.layout.by_token)
        and case.shipped() is not None
    ]


def left_out(path: Path, cases: Sequence[Case]) -> int:
    """How many kernels of a result file would be lost, if a part of all cases replaced it."""
    if not path.exists() or set(all_cases()) <= set(cases):
        return 0
    return len({case_of(row) for row in read_rows(path)} - set(cases))


def case_of(row: Row) -> Case:
    return Case(*(row[name] for name in Case.__dataclass_fields__))


Changes = Mapping[str, int | None]
"""Fields of a launch configuration that take other values than those that are shipped."""


def compile_all(
    cases: Sequence[Case],
    progress: Callable[[int, int], object] | None = None,
    changes: Sequence[Changes] = ({},),
) -> list[Row]:
    """A row for each case with each set of changes, in their order; compiled by as many processes
    as there are cores."""
    tasks = [(case, changed) for changed in changes for case in cases]
    found: dict[int, Row] = {}
    with _no_interpreter():
        for number, row in each(compile_case, tasks):
            found[number] = row
            if progress is not None:
                progress(len(found), len(tasks))
    return [found[number] for number in range(len(tasks))]


@contextmanager
def _no_interpreter() -> Iterator[None]:
    """For processes that start inside: Triton reads this variable once, when PyTorch imports it."""
    value = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if value is not None:
            os.environ["TRITON_INTERPRET"] = value


def compile_case(case: Case, changes: Changes) -> Row:
    """The row of a case; with "error" in place of figures if the compiler refuses it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tokenmix_ops.backends.triton import launch

    dtype = DTYPES[case.dtype][1]
    layout, kernel = case.layout, launch.KERNELS[case.kernel]
    config = case.shipped()
    assert config is not None
    config = replace(config, **changes)  # type: ignore[arg-type]
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
        "maxnreg": config.maxnreg,
        "triton": triton.__version__,
        **{name: known[name] for name in ("tokenmix_ops", "commit", "date")},
    }
    try:
        compiled = triton.compile(
            ASTSource(kernel, types, constants, aligned),
            target=GPUTarget("cuda", int(case.architecture.removeprefix("sm_")), 32),
            options=launch.options(config, layout),
        )
    except Exception as error:
        lines = str(error).strip().splitlines()
        return {**row, "error": lines[-1] if lines else repr(error)}
    metadata = compiled.metadata
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    found = _disassembled(compiled.asm["cubin"])
    resident = ARCHITECTURES[case.architecture].programs_per_sm(
        found["registers"], metadata.shared, config.num_warps, tensor_memory
    )
    code = sass.disassemble(compiled.asm["cubin"])
    # A kernel with few keys may have had its loop unrolled.
    main = code.main_loop() or range(len(code.instructions))
    row = {
        **row,
        "shared": metadata.shared,
        "tensor_memory": tensor_memory,
        **found,
        "programs_per_sm": resident,
        "loop": sass.counts(code.path(main)),
    }
    return {**row, **_predicted(case, config, code, resident)}


class Grid(NamedTuple):
    """How the main shape is divided among programs."""

    programs: int
    turns: int
    """Of each one's loop."""
    tiles: int
    """Of queries that each one works through."""


def _grid(case: Case, config: Config, multiprocessors: int) -> Grid | None:
    """None where the turns depend on the plan's tables."""
    layout = case.layout
    groups = BATCH * layout.num_rows * layout.num_heads
    tiles = -(-layout.group_queries // config.BLOCK_M)
    if case.kernel == "fwd_resident":
        from tokenmix_ops.backends.triton.launch import tiles_per_program

        each = tiles_per_program(groups, tiles, config.programs_per_sm * multiprocessors)
        return Grid(groups * -(-tiles // each), each, each)
    if case.kernel == "bwd_resident":
        return Grid(groups, tiles, tiles)
    if case.kernel in ("fwd_streamed", "bwd_query"):
        return Grid(groups * tiles, layout.num_keys // config.BLOCK_N, 1)
    return (
        None
        if layout.by_token
        else Grid(groups * -(-layout.num_keys // config.BLOCK_N), tiles, tiles)
    )


def _predicted(case: Case, config: Config, code: sass.Code, resident: int) -> Row:
    """What the model says of the main shape beside the time that its arithmetic takes; empty where
    there is no model."""
    machine = cycles.MACHINES.get(case.architecture)
    if machine is None or not resident or DTYPES[case.dtype][0] != 16:
        return {}
    grid = _grid(case, config, machine.multiprocessors)
    if grid is None:
        return {}
    programs = -(-grid.programs // machine.multiprocessors)
    played = cycles.play(
        cycles.whole_path(code, grid.turns),
        machine,
        programs=programs,
        resident=resident,
        warps=max(1, config.num_warps // cycles.PARTITIONS),
    )
    layout = case.layout
    logits = BATCH * layout.num_heads * layout.num_frames * layout.num_queries * layout.num_keys
    flops = 2 * PRODUCTS[case.kernel] * logits * case.head_dim
    per_second = machine.multiprocessors * machine.clock
    floor = max(flops / machine.products, logits / machine.exponentials) / per_second
    return {
        "predicted_us": round(1e6 * played.cycles / machine.clock, 1),
        "floor_us": round(1e6 * floor, 1),
        "cycles_per_tile": round(played.cycles / programs / grid.tiles),
        "busy": {name: round(share, 3) for name, share in played.busy.items()},
        "waits": {name: round(share, 3) for name, share in played.waits.items()},
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


def fastest_first(row: Row) -> tuple[str, str, str, str, int, float]:
    """A key to sort variants by: those of a case together, the fastest by the model first."""
    case = (row["architecture"], row["kernel"], row["keys"], row["dtype"], row["head_dim"])
    return *case, row.get("predicted_us", float("inf"))


def problems(rows: Sequence[Row]) -> list[str]:
    """What must not be, in a line each.

    A kernel that does not compile, that takes more memory than there is, that came out empty (the
    compiler of sm_100 then says nothing), that spills more than `STACK_LIMIT` at head_dim 64, or
    whose 16-bit products miss the matrix instruction of their architecture.
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
        elif row["head_dim"] <= 64 and row["stack"] > STACK_LIMIT:
            problem = (
                f"spills: {row['stack']} bytes of stack, {counts['LDL']} loads, "
                f"{counts['STL']} stores"
            )
        if problem is not None:
            found.append(f"{case_of(row)}: {problem}")
    return found
