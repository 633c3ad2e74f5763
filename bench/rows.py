"""Result files: rows of data as JSON lines, written, read, and two files set side by side."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]

CIRCUMSTANCES = (
    *("hardware", "threads", "processor", "multiprocessors", "memory_gib", "driver", "cuda"),
    *("cudnn", "triton", "python", "torch", "av", "tokenmix_ops", "commit", "date", "tests"),
    *("launch_file", "compiling", "clocks", "kernel_cache", "isa", "forced_isa"),
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


def whole_rows(path: Path) -> list[Row]:
    """Rows of a file in which processes may have died while they wrote, without those lines."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
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


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds whole lines at the end of a file in one write, so that a killed process spoils at most
    the last line (`repair`)."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        left = text.encode()
        while left:
            left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)


def repair(path: Path) -> int:
    """Cuts off a last line that a killed process left unfinished; returns its bytes, 0 if none."""
    whole = path.read_bytes() if path.exists() else b""
    kept = whole.rfind(b"\n") + 1
    if kept < len(whole):
        os.truncate(path, kept)
    return len(whole) - kept


OURS = ("triton", "cpu", "token_mixing")
"""This project's contenders of the operator and of the layer."""


def latest(rows: Sequence[Row]) -> list[Row]:
    """Rows without those of races that a later stage of the same run repeated.

    A race is what one stage timed of a part, shape and pass. The latest in which one of `OURS` was
    timed counts, else the latest in which any was, else the latest.
    """

    def race(row: Row) -> tuple[Any, ...]:
        return row.get("part"), row.get("shape"), row.get("pass")

    timed = [row for row in rows if "median_ms" in row or "median_us" in row]
    ours = [row for row in timed if row.get("contender") in OURS]
    last = {race(row): row.get("stage") for row in (*rows, *timed, *ours)}
    return [row for row in rows if "contender" not in row or row.get("stage") == last[race(row)]]


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

    Rows match if they agree in all that was chosen: the pass, the contender, the shape. They are
    called by what tells them apart. Rows that only one file has, and differences of hardware and
    versions, are listed below the table. Raises ValueError if a file has nothing to compare, or no
    row of the other.
    """
    suites = [sorted({str(row.get("suite")) for row in rows}) for rows in (old, new)]
    if old and new and suites[0] != suites[1]:
        of = " and ".join(", ".join(names) for names in suites)
        raise ValueError(f"expected two files of the same suite, got {of}")
    before, after = (
        {_identity(row): value for row in rows if (value := _value(row))} for rows in (old, new)
    )
    if not before or not after:
        which = " and ".join(n for n, of in (("old", before), ("new", after)) if not of)
        raise ValueError(
            f"expected timings or peaks of memory in both files, got none in the {which} one"
        )
    common = [identity for identity in before if identity in after]
    if not common:
        raise ValueError("expected two files that measure the same, got none of the old one's rows")
    telling = _telling([*before, *(identity for identity in after if identity not in before)])
    lines = ["| row | old | new | old / new |", "|---|---:|---:|---:|"]
    for identity in common:
        (was, unit), (now, _) = before[identity], after[identity]
        lines.append(
            f"| {_label(identity, telling)} | {was:.4g} {unit} | {now:.4g} {unit} | "
            f"{was / now:.3f}× |"
        )
    lines.append("")
    for title, here, there in (("old", before, after), ("new", after, before)):
        alone = [identity for identity in here if identity not in there]
        lines += [f"- only in the {title} file: {_label(i, telling)}" for i in alone]
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


def _telling(identities: Sequence[Identity]) -> list[str]:
    """A few keys that tell these rows apart: words before numbers, short ones before long ones."""
    rows = [dict(identity) for identity in identities]
    shared = frozenset.intersection(*identities)
    varying = sorted({key for identity in identities for key, _ in identity - shared})

    def weight(key: str) -> tuple[bool, int]:
        values = [row[key] for row in rows if key in row]
        return not any(value.startswith('"') for value in values), max(map(len, values))

    kept = varying
    for key in sorted(varying, key=weight, reverse=True):
        fewer = [other for other in kept if other != key]
        if len({tuple(row.get(k) for k in fewer) for row in rows}) == len(rows):
            kept = fewer
    return kept or sorted(rows[0])


def _label(identity: Identity, telling: Sequence[str]) -> str:
    row = dict(identity)
    return ", ".join(f"{key} {row[key].strip(chr(34))}" for key in telling if key in row)
