"""Result files to tables, and the tables into the README, so that no figure is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenmix_ops.bench.gpu_table import gpu_table
from tokenmix_ops.bench.layers import TITLES
from tokenmix_ops.bench.measure import Timings, ratio
from tokenmix_ops.bench.suites import Row
from tokenmix_ops.bench.training_table import memory_table, training_table
from tokenmix_ops.bench.video_tables import (
    loading_table,
    rerank_table,
    search_table,
    world_table,
)

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


def aot_table(rows: Sequence[Row]) -> str:
    """What the compiler reports, as Markdown: a line for each kernel, a column for each GPU."""
    columns = list(dict.fromkeys(row["architecture"] for row in rows))
    cells: dict[tuple[str, str, int], dict[str, dict[str, str]]] = {}
    for row in rows:
        of_kernel = cells.setdefault((row["kernel"], row["keys"], row["head_dim"]), {})
        of_kernel.setdefault(row["dtype"], {})[row["architecture"]] = _compiled(row)
    lines = ["| kernel | keys | head_dim | dtype | " + " | ".join(columns) + " |"]
    lines.append("|---|---|---:|---|" + "---:|" * len(columns))
    for (kernel, keys, head_dim), of_kernel in cells.items():
        # What both 16-bit dtypes come out as is told once.
        dtypes: dict[str, list[str]] = {}
        for dtype, of_dtype in of_kernel.items():
            reports = " | ".join(of_dtype.get(column, "–") for column in columns)
            dtypes.setdefault(reports, []).append(dtype)
        for reports, alike in dtypes.items():
            lines.append(f"| {kernel} | {keys} | {head_dim} | {', '.join(alike)} | {reports} |")
    row = rows[0]
    lines += [
        "",
        "Registers of a thread / KB of shared memory of a program / bytes spilled / matrix "
        "instructions in the code; – where another kernel serves. Keys as `released` finds them, "
        "then already selected, then from a table. Compiled by Triton "
        f"{row['triton']} for 8 frames of 197 tokens, 12 heads; nothing ran on a GPU. "
        f"tokenmix_ops {row['tokenmix_ops']} at {row['commit']}, {row['date']}.",
    ]
    return "\n".join(lines)


def _compiled(row: Row) -> str:
    if "error" in row:
        return "does not compile"
    products = {name: row["instructions"][name] for name in ("UTCHMMA", "HGMMA", "HMMA")}
    used = [f"{count} {name}" for name, count in products.items() if count] or ["none"]
    return f"{row['registers']} / {row['shared'] / 1024:.0f} / {row['stack']} / {' + '.join(used)}"


TABLES = {
    "aot": aot_table,
    "gpu": gpu_table,
    "layer": layer_table,
    "loading": loading_table,
    "memory": memory_table,
    "rerank": rerank_table,
    "search": search_table,
    "training": training_table,
    "world": world_table,
}


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
