"""Launch configurations: data files, one per GPU architecture; nothing is tuned at run time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Config:
    """How to launch a kernel for calls with at most this head_dim and number of keys."""

    kernel: str
    dtype_bits: int
    head_dim: int
    num_keys: int | None
    """None means any number."""
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """Registers that a thread may take, so that more programs share an SM; None leaves it to the
    compiler."""
    gain_by_frame: bool = False
    """Whether the forward kernel that holds all keys looks for the largest logits frame by frame,
    where it can. That saves multiplications where a thread has the keys of few frames."""
    programs_per_sm: int = 1
    """For the kernels that hold all keys: programs that run on an SM at once (forward), or below
    which another kernel is used (backward)."""

    def fits(self, kernel: str, dtype_bits: int, head_dim: int, num_keys: int) -> bool:
        return (
            self.kernel == kernel
            and self.dtype_bits == dtype_bits
            and self.head_dim >= head_dim
            and (self.num_keys is None or self.num_keys >= num_keys)
        )


@dataclass(frozen=True)
class Architecture:
    """Contents of an architecture's file."""

    name: str
    source: str
    """Where the numbers come from."""
    fastest: tuple[dict[str, int], ...]
    """Calls for which a benchmark found these kernels the fastest: those with at most this
    ``head_dim`` and with this ``dtype_bits``."""
    configs: tuple[Config, ...]

    def find(self, kernel: str, dtype_bits: int, head_dim: int, num_keys: int) -> Config | None:
        """Returns the first configuration that fits a call, None if there is none."""
        fitting = (c for c in self.configs if c.fits(kernel, dtype_bits, head_dim, num_keys))
        return next(fitting, None)


_replacements: dict[str, Architecture] = {}


def load(name: str) -> Architecture:
    """Loads the configurations of an architecture such as ``"sm_90"``, or the default ones."""
    return _replacements.get(name) or _read(name)


@contextmanager
def replaced(architecture: Architecture) -> Iterator[None]:
    """Makes `load` return this architecture inside the block, in all threads; for tuning."""
    before = dict(_replacements)
    _replacements[architecture.name] = architecture
    try:
        yield
    finally:
        _replacements.clear()
        _replacements.update(before)


def read(path: Path, name: str) -> Architecture:
    """Reads the configurations of an architecture from a file such as those beside this one."""
    content: dict[str, Any] = json.loads(path.read_text())
    configs = tuple(Config(**entry) for entry in content["configs"])
    return Architecture(name, content["source"], tuple(content["fastest"]), configs)


@lru_cache
def _read(name: str) -> Architecture:
    path = FOLDER / f"{name}.json"
    return read(path if path.exists() else FOLDER / "default.json", name)
