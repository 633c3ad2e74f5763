"""What the tuner looks for, in the order of what matters, and the configurations that it tries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from bench.operators import ADJACENT, MAIN
from tokenmix_ops.backends.triton.configs import Architecture, Config
from tokenmix_ops.backends.triton.layout import ONE_PASS
from tokenmix_ops.testing import Case

KERNELS = ("fwd_resident", "fwd_streamed", "bwd_resident", "bwd_query", "bwd_key")
RIVALS = {
    "fwd_streamed": "fwd_resident",
    "bwd_query": "bwd_resident",
    "bwd_key": "bwd_resident",
}
"""The kernel that is used in place of another where it has a configuration."""


@dataclass(frozen=True)
class Goal:
    """One entry of a configuration file that is to be found, and the calls that it has to serve,
    the most important first."""

    kernel: str
    dtype_bits: int
    head_dim: int
    num_keys: int | None
    cases: tuple[Case, ...]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype_bits == 16 else torch.float32

    @property
    def of_pass(self) -> str:
        return "forward" if self.kernel.startswith("fwd") else "backward"

    def __str__(self) -> str:
        keys = "any number of keys" if self.num_keys is None else f"at most {self.num_keys} keys"
        return f"{self.kernel}, {self.dtype_bits} bits, head_dim {self.head_dim}, {keys}"


FRAMES = replace(MAIN, mixing=ADJACENT)
LARGE = replace(MAIN, batch=16, num_tokens=577)
WIDE = replace(MAIN, batch=32, num_heads=6, head_dim=128)
FORWARD = (MAIN, replace(MAIN, batch=16), replace(MAIN, batch=8), FRAMES)
SINGLE = (replace(MAIN, batch=16),)

GOALS = (
    # The main shape runs these two.
    Goal("fwd_resident", 16, 64, 256, FORWARD),
    Goal("bwd_resident", 16, 64, 256, (MAIN,)),
    # Per-frame keys and small batches run these two backwards.
    Goal("bwd_query", 16, 64, 256, (FRAMES, MAIN)),
    Goal("bwd_key", 16, 64, 256, (FRAMES, MAIN)),
    Goal("fwd_streamed", 16, 64, 256, FORWARD),
    Goal("fwd_resident", 16, 64, 640, (LARGE,)),
    Goal("fwd_streamed", 16, 64, None, (LARGE,)),
    Goal("bwd_query", 16, 64, None, (LARGE,)),
    Goal("bwd_key", 16, 64, None, (LARGE,)),
    Goal("fwd_streamed", 32, 64, None, SINGLE),
    Goal("bwd_query", 32, 64, None, SINGLE),
    Goal("bwd_key", 32, 64, None, SINGLE),
    Goal("fwd_streamed", 16, 128, None, (WIDE,)),
    Goal("bwd_query", 16, 128, None, (WIDE,)),
    Goal("bwd_key", 16, 128, None, (WIDE,)),
)

Ranges = tuple[tuple[int, ...], ...]
# BLOCK_M, BLOCK_N, num_warps, num_stages.
TILES: dict[str, Ranges] = {
    "fwd_resident": ((64, 128), (128, 256), (4, 8), (1, 2, 3)),
    "fwd_streamed": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "bwd_resident": ((16, 32, 64), (128, 256), (8, 16), (1, 2, 3)),
    "bwd_query": ((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
    "bwd_key": ((32, 64), (64, 128), (4, 8), (1, 2, 3)),
}
LONG_TILES: Ranges = ((64, 128), (64, 128), (4, 8), (1, 2))
"""Of the resident forward kernel where it takes more than one pass."""
FLOAT32_TILES: Ranges = ((32, 64), (32, 64), (4, 8), (1, 2))
FAVOURED = (
    Config("fwd_resident", 16, 64, 256, 64, 256, 4, 1, maxnreg=168, gain_by_frame=True),
    Config("fwd_resident", 16, 64, 256, 64, 256, 4, 2, maxnreg=168, gain_by_frame=True),
    Config("fwd_resident", 16, 64, 256, 64, 128, 4, 1),
    Config("bwd_resident", 16, 64, 256, 64, 256, 8, 3),
    Config("bwd_resident", 16, 64, 256, 64, 256, 8, 1),
    Config("bwd_resident", 16, 64, 256, 32, 256, 8, 3),
    Config("bwd_resident", 16, 64, 256, 32, 256, 8, 1),
    Config("bwd_key", 16, 64, 256, 32, 256, 8, 3),
)
"""What the compiler's reports speak for: tried first."""
CAPPED = 168
"""Registers with which three programs of 4 warps share an SM. Four would have 128, and so would two
of 8 warps: too few beside the logits of the main shape."""
PROGRAMS_PER_SM = (1, 2, 3, 4)

REGISTERS, OF_THREAD = 65_536, 255
"""Of an SM, and the most of one thread."""
OTHERS = 40
"""Registers that a thread needs beside the results of products: addresses, maxima, sums."""
WARP_ROWS = 16
"""Rows of a product that one warp takes; with fewer, warps share rows and their maxima."""
RESERVED = 1024
"""Bytes of shared memory that a program takes beside its own."""


@dataclass(frozen=True)
class Chip:
    """What candidates have to fit."""

    shared: int = 233_472
    """Bytes of shared memory of an SM; of an H100 by default."""
    tensor_memory: bool = False
    """Whether products leave their results in a memory of their own, not in registers."""


def chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip()
    found = torch.cuda.get_device_properties(device)
    return Chip(found.shared_memory_per_multiprocessor, found.major == 10)


def candidates(goal: Goal, known: Iterable[Architecture], chip: Chip) -> list[Config]:
    """What is tried for a goal, the likeliest first: the entries of the architectures that are
    ``known``, what is favoured, and all tiles that may fit the ``chip``."""
    key = (goal.kernel, goal.dtype_bits, goal.head_dim, goal.num_keys)
    entries = [one.find(*key[:3], goal.cases[0].plan.num_keys) for one in known]
    found = [
        replace(entry, head_dim=goal.head_dim, num_keys=goal.num_keys) for entry in entries if entry
    ]
    found += [c for c in FAVOURED if (c.kernel, c.dtype_bits, c.head_dim, c.num_keys) == key]
    for rows, width, warps, stages in product(*_ranges(goal)):
        for maxnreg in _caps(goal, warps):
            by_frame = goal.kernel == "fwd_resident" and not chip.tensor_memory
            config = Config(*key, rows, width, warps, stages, maxnreg, by_frame)
            if misfit(goal, config, chip) is None:
                found.append(config)
    unique: dict[Config, Config] = {}
    for config in found:
        unique.setdefault(compiled(config), config)
    return list(unique.values())


def _ranges(goal: Goal) -> Ranges:
    if goal.dtype_bits == 32:
        return FLOAT32_TILES
    return LONG_TILES if _long(goal) else TILES[goal.kernel]


def _long(goal: Goal) -> bool:
    return goal.kernel == "fwd_resident" and (goal.num_keys or 0) > ONE_PASS


def _caps(goal: Goal, num_warps: int) -> tuple[int | None, ...]:
    """Values of maxnreg."""
    return (None, CAPPED) if goal.kernel == "fwd_resident" and num_warps == 4 else (None,)


def misfit(goal: Goal, config: Config, chip: Chip) -> str | None:
    """Why it is certain, before any compilation, that a configuration cannot be good; None if it
    is not.

    Only what must be in shared memory and in registers at one moment is counted, so what passes
    may still take too much.
    """
    rows = config.BLOCK_M // config.num_warps
    if goal.of_pass == "forward" and goal.dtype_bits == 16 and not _long(goal) and rows < WARP_ROWS:
        return f"has {rows} rows for a warp that takes {WARP_ROWS}"
    threads = 32 * config.num_warps
    limit = min(OF_THREAD, REGISTERS // threads, config.maxnreg or OF_THREAD)
    numbers, shared = _least(goal, config)
    registers = numbers // threads + OTHERS
    if registers > limit and not chip.tensor_memory:
        return f"needs {registers} registers of {limit}"
    programs = REGISTERS // (threads * config.maxnreg) if config.maxnreg else 1
    if programs * (shared + RESERVED) > chip.shared:
        return f"{programs} programs need {programs * shared} bytes of shared memory"
    return None


def _least(goal: Goal, config: Config) -> tuple[int, int]:
    """The fewest float32 results of products that a program holds at one moment, and the fewest
    bytes of its tiles in shared memory."""
    from tokenmix_ops.backends.triton.launch import key_tiles

    widths = [t.width for t in key_tiles(goal.cases[0].plan.num_keys, config.BLOCK_N)]
    queries, keys, width = config.BLOCK_M, sum(widths), max(widths)
    dims, itemsize = goal.head_dim, goal.dtype_bits // 8
    # A tile in use, and those loaded ahead of it.
    buffers = max(1, config.num_stages - 1)
    if goal.kernel == "fwd_resident":
        logits = width + dims if _long(goal) else keys
        return queries * logits, 2 * keys * dims * itemsize
    if goal.kernel == "bwd_resident":
        # Of more than 32 queries half at once.
        at_once = queries // 2 if queries > 32 else queries
        return 2 * keys * dims + 2 * at_once * width, 2 * keys * dims * itemsize
    if goal.kernel == "bwd_key":
        tiles = 2 * (config.BLOCK_N + buffers * queries)
        return 2 * config.BLOCK_N * (queries + dims), tiles * dims * itemsize
    logits = 2 * width if goal.kernel == "bwd_query" else width
    return queries * (logits + dims), 2 * buffers * width * dims * itemsize


def compiled(config: Config) -> Config:
    """The same for all that compile to the same code: the division of the work is not compiled."""
    return replace(config, programs_per_sm=1)


def spread(config: Config) -> list[Config]:
    """The ways of dividing the work among programs, the given one first if it is none of ours."""
    if config.kernel != "fwd_resident":
        return [config]
    own = [config] if config.programs_per_sm > 1 else []
    ways = [replace(config, programs_per_sm=number) for number in PROGRAMS_PER_SM]
    return list(dict.fromkeys((*own, *ways)))


def spread_all(configs: Sequence[Config]) -> list[Config]:
    return [way for config in configs for way in spread(config)]
