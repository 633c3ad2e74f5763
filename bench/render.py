"""Tables into the pages that show them, so that no figure is typed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.rows import read_rows
from bench.tables import TABLES, headlines_table

BEGIN, END = "<!-- rendered: {} -->", "<!-- end of rendered -->"


def rendered(text: str, results: Path) -> str:
    """``text`` with each block between rendering marks replaced by its table.

    Raises ValueError if a block has no end or names no known table.
    """
    out, position = [], 0
    while (start := text.find("<!-- rendered: ", position)) >= 0:
        stop, end = text.find(" -->", start), text.find(END, start)
        if stop < 0 or end < stop:
            raise ValueError("a rendered block has no end")
        name = text[start + len("<!-- rendered: ") : stop]
        table = headlines_table(results) if name == "headlines" else _table(name, results)
        out += [text[position:start], BEGIN.format(name), "\n", table, "\n"]
        position = end
    return "".join(out) + text[position:]


def _table(name: str, results: Path) -> str:
    suite, file = name.split("-")[0], results / f"{name}.jsonl"
    if suite not in TABLES:
        raise ValueError(f"unknown rendered block {name!r}")
    return TABLES[suite](read_rows(file)) if file.exists() else "Not measured."


def update(pages: Sequence[Path], results: Path, check: bool = False) -> None:
    """Renders pages in place; with ``check`` raises ValueError if one would change."""
    stale = []
    for page in pages:
        text = page.read_text("utf-8")
        fresh = rendered(text, results)
        if fresh == text:
            continue
        stale.append(str(page))
        if not check:
            page.write_text(fresh, "utf-8")
    if check and stale:
        raise ValueError(
            f"{' and '.join(stale)}: differs from the rows in {results}; run python -m bench render"
        )
