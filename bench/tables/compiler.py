"""What the compiler makes of the kernels, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.rows import Row
from bench.tables.layout import line


def aot_table(rows: Sequence[Row]) -> str:
    """What the compiler reports, as Markdown: a line for each kernel, a column for each GPU; then
    the main loops of the 16-bit kernels and the time that the model predicts."""
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
        "Registers of a thread / KB of shared memory of a program / bytes spilled / programs that "
        "fit an SM / matrix instructions in the code; – where another kernel serves. Keys as "
        "`released` finds them, then already selected, then from a table. Compiled by Triton "
        f"{row['triton']} for 8 frames of 197 tokens, 12 heads; nothing ran on a GPU. "
        f"tokenmix_ops {row['tokenmix_ops']} at {row['commit']}, {row['date']}.",
    ]
    modelled = [row for row in rows if row["dtype"] == "bfloat16" and "predicted_us" in row]
    if modelled:
        lines += ["", loops_table(modelled)]
    return "\n".join(lines)


def _compiled(row: Row) -> str:
    if "error" in row:
        return "does not compile"
    products = {name: row["instructions"][name] for name in ("UTCHMMA", "HGMMA", "HMMA")}
    used = [f"{count} {name}" for name, count in products.items() if count] or ["none"]
    return (
        f"{row['registers']} / {row['shared'] / 1024:.0f} / {row['stack']} / "
        f"{row['programs_per_sm']} / {' + '.join(used)}"
    )


LOOP_COLUMNS = {
    "instructions": "instructions",
    "products": "products",
    "product_waits": "waits",
    "exponentials": "exp2",
    "reciprocals": "1/x",
    "multiplications": "FMUL",
}
"""What the table shows of a main loop, with its titles there."""


def loops_table(rows: Sequence[Row]) -> str:
    """Main loops and the model's predictions as Markdown, a line for each kernel."""
    titles = ("registers", "KB", "spilled", "programs/SM", *LOOP_COLUMNS.values(), "cycles")
    names = ("kernel", "keys", "head_dim", "GPU", "launched as")
    lines = [line(*names, *titles, "busiest", "warps wait for", "µs", "floor")]
    lines.append("|---|---|---:|---|---|" + "---:|" * len(titles) + "---|---|---:|---:|")
    for row in rows:
        cells = [row["kernel"], row["keys"], row["head_dim"], row["architecture"]]
        cells.append(f"{row['BLOCK_M']} × {row['BLOCK_N']}, {row['num_warps']} warps")
        cells[-1] += f", {row['num_stages']} stage" + "s" * (row["num_stages"] != 1)
        if row["maxnreg"] is not None:
            cells[-1] += f", {row['maxnreg']} registers"
        if "error" in row:
            cells.append(f"does not compile: {row['error']}")
        else:
            cells += [row["registers"], f"{row['shared'] / 1024:.0f}", row["stack"]]
            cells += [row["programs_per_sm"], *(row["loop"][name] for name in LOOP_COLUMNS)]
        if "predicted_us" in row:
            cells += [row["cycles_per_tile"], _shares(row["busy"]), _shares(row["waits"])]
            cells += [f"{row['predicted_us']:.0f}", f"{row['floor_us']:.0f}"]
        lines.append(line(*cells))
    lines += [
        "",
        "The main loop as a warp runs it: all instructions, matrix instructions, waits for them, "
        "exponentials, reciprocals, multiplications. Then what a model of an SM predicts from the "
        "machine code for 64 videos: an SM's cycles for a tile of queries, its two busiest pipes, "
        "what warps wait for most, the time on an A100 at 1.41 GHz or an H100 at 1.755 GHz, and "
        "that of the arithmetic alone. Predictions are about a fifth too low; use them only to "
        f"compare variants. Compiled by Triton {rows[0]['triton']}.",
    ]
    return "\n".join(lines)


def _shares(of_time: Mapping[str, float]) -> str:
    """The two largest, in percent."""
    largest = sorted(of_time, key=of_time.__getitem__, reverse=True)[:2]
    return ", ".join(f"{name} {of_time[name]:.0%}" for name in largest)
