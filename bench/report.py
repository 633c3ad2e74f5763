"""What result files say, without writing any page: tables, and a picture of a run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from bench.arguments import ISAS
from bench.picture import draw
from bench.rows import read_rows
from bench.tables import TABLES
from bench.tables.cpu import cpu_table
from bench.targets import Results

PICTURED = ("gpu", "rehearsal")


def report(file: Path) -> str:
    """The table of a result file; draws the picture beside it if the run timed the operator."""
    rows, suite = read_rows(file), file.stem.split("-")[0]
    if suite in PICTURED and find_spec("matplotlib") and Results(rows).part("operator"):
        draw(rows, file.with_suffix(".png"))
    return TABLES[suite](rows)


def reports(folder: Path) -> Iterator[str]:
    """A table for each result file of a folder, then those of CPUs together; ValueError if it has
    none."""
    files = [path for path in sorted(folder.glob("*.jsonl")) if path.stem.split("-")[0] in TABLES]
    if not files:
        raise ValueError(f"expected result files in {folder}, found none")
    for file in files:
        yield f"{file}\n\n{report(file)}\n"
    for device in ("cpu", *(f"cpu-{isa}" for isa in ISAS)):
        if table := cpu_table(folder, device):
            yield f"targets-{device}\n\n{table}\n"
