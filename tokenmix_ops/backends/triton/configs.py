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
    programs_per_sm: int = 1
    """For the kernels that hold all keys: programs per SM to split the work into (forward), or
    below which another kernel is used (backward)."""

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


@lru_cache
def _read(name: str) -> Architecture:
    path = FOLDER / f"{name}.json"
    known = path if path.exists() else FOLDER / "default.json"
    content: dict[str, Any] = json.loads(known.read_text())
    configs = tuple(Config(**entry) for entry in content["configs"])
    return Architecture(name, content["source"], tuple(content["fastest"]), configs)
