"""Which of our kernels a run found compiled, and which it had to compile."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench.rows import Row, append_rows, read_rows


def listen(path: Path) -> None:
    """Notes in a file the kernels that this process and its forks load or compile from now on."""
    from triton import knobs

    knobs.compilation.listener = partial(_note, path)


def _note(path: Path, *, src: Any, metadata: Mapping[str, Any], cache_hit: bool, **_: Any) -> None:
    # PyTorch's compiler has kernels of its own.
    if getattr(src, "fn", None) is not None and src.fn.__module__.startswith("tokenmix_ops."):
        append_rows(path, [{"hash": metadata["hash"], "found": cache_hit}])


def hit_rows(path: Path) -> list[Row]:
    """How many kernels were found in the cache and how many were not, in a row; none if none was
    needed."""
    noted = read_rows(path) if path.exists() else []
    compiled = {row["hash"] for row in noted if not row["found"]}
    found = {row["hash"] for row in noted} - compiled
    return [{"part": "kernels", "found": len(found), "compiled": len(compiled)}] if noted else []
