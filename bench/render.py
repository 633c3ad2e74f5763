"""Tables into the pages that show them, so that no figure is typed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from bench.headlines import headlines_table
from bench.rows import read_rows
from bench.tables import TABLES
from bench.tables.cpu import cpu_table

UNMEASURED = "Not measured."
SOURCES = {
    "headlines": "layer-cpu.jsonl and rerank-cpu.jsonl",
    "targets-cpu": "operator-cpu.jsonl, layer-cpu.jsonl and tower-cpu.jsonl",
}
"""Of a block that is not named after its file."""
BEGIN, END = "<!-- rendered: {} -->", "<!-- end of rendered -->"


class Block(NamedTuple):
    """What a page shows between rendering marks, and where it stands."""

    name: str
    shown: str
    start: int
    end: int


def blocks(text: str) -> list[Block]:
    """Those of a page. Raises ValueError if one has no end."""
    found, position = [], 0
    while (start := text.find("<!-- rendered: ", position)) >= 0:
        stop, end = text.find(" -->", start), text.find(END, start)
        if stop < 0 or end < stop:
            raise ValueError("a rendered block has no end")
        name = text[start + len("<!-- rendered: ") : stop]
        found.append(Block(name, text[stop + len(" -->") : end].strip(), start, end))
        position = end
    return found


def rendered(text: str, results: Path) -> str:
    """``text`` with each block between rendering marks replaced by its table.

    A block is named after a file of results; ``*`` in place of the device stands for every GPU, a
    table each. ``targets-`` and a CPU's name stand for all its files
    (`cpu_table`). Raises ValueError if a block has no end or names no known table.
    """
    out, position = [], 0
    for name, _, start, end in blocks(text):
        table = headlines_table(results) if name == "headlines" else _table(name, results)
        out += [text[position:start], BEGIN.format(name), "\n", table, "\n"]
        position = end
    return "".join(out) + text[position:]


def _table(name: str, results: Path) -> str:
    suite, _, device = name.partition("-")
    if suite == "targets":
        return cpu_table(results, device) or UNMEASURED
    if suite not in TABLES:
        raise ValueError(f"unknown rendered block {name!r}")
    files = sorted(results.glob(f"{name}.jsonl"))
    if name.endswith("-*"):
        files = [file for file in files if not file.stem.startswith(f"{suite}-cpu")]
    tables = [TABLES[suite](rows) for file in files if (rows := read_rows(file))]
    return "\n\n".join(tables) or UNMEASURED


def update(pages: Sequence[Path], results: Path, check: bool = False) -> None:
    """Renders pages in place; with ``check`` raises ValueError if one would change.

    Raises ValueError, and changes no page, if ``results`` lacks rows that a page shows.
    """
    if not results.is_dir():
        raise ValueError(f"expected a folder of rows, got {results}")
    stale, missing = {}, []
    for page in pages:
        text = page.read_text("utf-8")
        fresh = rendered(text, results)
        missing += [
            f"{SOURCES.get(old.name, f'{old.name}.jsonl')} ({page})"
            for old, new in zip(blocks(text), blocks(fresh), strict=True)
            if new.shown == UNMEASURED and old.shown not in ("", UNMEASURED)
        ]
        if fresh != text:
            stale[page] = fresh
    if missing:
        raise ValueError(
            f"{results} lacks rows that the pages show: {', '.join(missing)}; no page was changed"
        )
    if check and stale:
        verb = "differs" if len(stale) == 1 else "differ"
        raise ValueError(
            f"{' and '.join(map(str, stale))} {verb} from the rows in {results}; "
            "run the same command without --check"
        )
    for page, fresh in stale.items():
        page.write_text(fresh, "utf-8")


def is_shown(file: Path, pages: Sequence[Path], results: Path) -> bool:
    """Whether pages show a file of results, if they are rendered from ``results``."""
    names = [block.name for page in pages if page.exists() for block in blocks(page.read_text())]
    return file.parent.resolve() == results.resolve() and any(
        fnmatch(file.stem, name) for name in names
    )
