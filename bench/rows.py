"""Result files: rows of data as JSON lines, written, read, and two files set side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]

CIRCUMSTANCES = (
    *("hardware", "threads", "processor", "multiprocessors", "memory_gib", "driver", "cuda"),
    *("cudnn", "triton", "python", "torch", "av", "tokenmix_ops", "commit", "date", "tests"),
)
"""What rows say of the machine and the code: `compare` lists these where the files differ."""
MEASURED = re.compile(
    "relative_error|extra_mb|deterministic|reason|difference|ratio|updated|per_s|growth_mib"
    "|^(rounds|seconds|mib|kind|parameters|gradients|optimiser states|activations|temporary)$"
    "|(peak|_ms|_us)"
)
"""Other keys that identify no row, because their values were measured, not chosen."""
VALUES = {"rounds_ms": "ms", "rounds_us": "µs", "rounds": "", "peak_gib": "GiB", "peak_mib": "MiB"}
"""What `compare` compares, the first that a row has, with its unit."""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines; the file is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unfinished.replace(path)


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file; ValueError names the file and line that is not one."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def update_rows(path: Path, rows: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """Writes rows into a file, over those with the same values of ``names``; returns all."""
    known = (
        {tuple(row[name] for name in names): row for row in read_rows(path)}
        if path.exists()
        else {}
    )
    known |= {tuple(row[name] for name in names): row for row in rows}
    write_rows(path, known.values())
    return [*known.values()]


class Keeper:
    """Collects rows, gives them the facts that all share, and writes the file after each call."""

    def __init__(self, path: Path, facts: Row) -> None:
        self.path, self.facts = path, facts
        self.rows: list[Row] = []

    def __call__(self, measured: Iterable[Row]) -> None:
        self.rows += [{**row, **self.facts} for row in measured]
        write_rows(self.path, self.rows)


def compare(old: Sequence[Row], new: Sequence[Row]) -> str:
    """Two result files as one Markdown table: medians, and the old one over the new one.

    Rows match if they agree in all that was chosen: the pass, the contender, the shape. Rows that
    only one file has, and differences of hardware and versions, are listed below the table. Raises
    ValueError if a file has nothing to compare.
    """
    before, after = (
        {_identity(row): value for row in rows if (value := _value(row))} for rows in (old, new)
    )
    if not before or not after:
        raise ValueError("expected files with timings or peaks of memory in both places")
    common = [identity for identity in before if identity in after]
    varying = _varying(common)
    lines = ["| row | old | new | old / new |", "|---|---:|---:|---:|"]
    for identity in common:
        (was, unit), (now, _) = before[identity], after[identity]
        lines.append(
            f"| {_label(identity, varying)} | {was:.4g} {unit} | {now:.4g} {unit} | "
            f"{was / now:.3f}× |"
        )
    lines.append("")
    for title, here, there in (("old", before, after), ("new", after, before)):
        alone = [identity for identity in here if identity not in there]
        lines += [f"- only in the {title} file: {_label(i, _varying(alone))}" for i in alone]
    for name in CIRCUMSTANCES:
        told = [
            ", ".join(dict.fromkeys(str(row[name]) for row in rows if name in row)) or "not said"
            for rows in (old, new)
        ]
        if told[0] != told[1]:
            lines.append(f"- {name}: {' → '.join(told)}")
    return "\n".join(lines).rstrip()


Identity = frozenset[tuple[str, str]]


def _identity(row: Row) -> Identity:
    found = set()
    for key, value in row.items():
        if key in (*CIRCUMSTANCES, "device") or MEASURED.search(key):
            continue
        parts = value if isinstance(value, dict) else {"": value}
        found |= {(f"{key} {name}".strip(), json.dumps(part)) for name, part in parts.items()}
    return frozenset(found)


def _value(row: Row) -> tuple[float, str] | None:
    """The median of what was measured, with its unit; None if nothing was."""
    for key, unit in VALUES.items():
        if row.get(key):
            if key == "rounds":
                unit = "clips/s" if "clips_per_second" in row else "s"
            return median(row[key]) if isinstance(row[key], list) else row[key], unit
    return None


def _varying(identities: Sequence[Identity]) -> set[str]:
    """The keys by which these rows differ from each other."""
    shared = frozenset.intersection(*identities) if identities else frozenset()
    return {key for identity in identities for key, _ in identity - shared}


def _label(identity: Identity, varying: set[str]) -> str:
    kept = {key: value for key, value in identity if key in varying} or dict(identity)
    return ", ".join(f"{key} {value.strip(chr(34))}" for key, value in sorted(kept.items()))
