"""Result files to tables, and the tables into the README, so that no figure is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenmix_ops.bench.layers import TITLES
from tokenmix_ops.bench.measure import Timings, ratio
from tokenmix_ops.bench.suites import Row

BEGIN, END = "<!-- rendered: {} -->", "<!-- end of rendered -->"

TARGETS = (
    ("forward", "spatial_sdpa", "token_mixing_gain_off", 1.4),
    ("forward + backward", "spatial_sdpa", "token_mixing_gain_off", 1.4),
    ("forward", "naive_gather", "token_mixing_gain_off", 2.0),
)
"""(pass, slower, faster, at least): what the eager backend has to reach on a CPU."""


def write_rows(path: Path, rows: Sequence[Row]) -> None:
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


def layer_table(rows: Sequence[Row]) -> str:
    """The layer suite as Markdown: milliseconds, ratios with their quartiles, targets."""
    timings: dict[str, Timings] = {}
    for row in rows:
        timings.setdefault(row["pass"], {})[row["contender"]] = row["rounds_ms"]
    medians = {(row["pass"], row["contender"]): row["median_ms"] for row in rows}
    names = list(timings["forward"])
    passes = list(timings)
    lines = ["| one layer, projections included | " + " | ".join(f"{p}, ms" for p in passes) + " |"]
    lines.append("|---|" + "---:|" * len(passes))
    for name in names:
        lines.append(
            f"| {TITLES[name]} | " + " | ".join(f"{medians[p, name]:.0f}" for p in passes) + " |"
        )
    lines += ["", "| ratio of the pairs in each round | median | quartiles | target |"]
    lines.append("|---|---:|---:|---:|")
    for name in ("token_mixing_gain_off", "token_mixing"):
        for one_pass in passes:
            for slower in names[: names.index("token_mixing_gain_off")]:
                middle, low, high = ratio(timings[one_pass], slower, name)
                target = next((t[3] for t in TARGETS if t[:3] == (one_pass, slower, name)), None)
                lines.append(
                    f"| {TITLES[name]}, {one_pass}: against {TITLES[slower]} | {middle:.2f}× | "
                    f"{low:.2f}–{high:.2f} | {f'≥ {target:.1f}×' if target else ''} |"
                )
    row = rows[0]
    lines += [
        "",
        f"{row['batch']} videos of {row['num_frames']} frames of {row['num_tokens']} tokens, width "
        f"{row['dim']}, {row['num_heads']} heads, {row['dtype']}; {len(row['rounds_ms'])} rounds, "
        f"contenders in turn; {row['hardware']}, {row['threads']} threads, PyTorch {row['torch']}, "
        f"tokenmix_ops {row['tokenmix_ops']} at {row['commit']}, {row['date']}.",
    ]
    return "\n".join(lines)


TABLES = {"layer": layer_table}


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
        if name.split("-")[0] not in TABLES:
            raise ValueError(f"unknown rendered block {name!r}")
        file = results / f"{name}.jsonl"
        table = TABLES[name.split("-")[0]](read_rows(file)) if file.exists() else "Not measured."
        out += [text[position:start], BEGIN.format(name), "\n", table, "\n"]
        position = end
    return "".join(out) + text[position:]
