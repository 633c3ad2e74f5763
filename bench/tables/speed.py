"""What layers, the operator and calls take, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from bench.rows import Row
from bench.tables.layout import line, machine, milliseconds, reasons, videos
from bench.targets import Results, contender_title, order
from tokenmix_ops.peer_layers import LAYER_TITLES
from tokenmix_ops.timing import Timings, ratio

CPU_TARGETS = (
    ("forward", "spatial_sdpa", "token_mixing_gain_off", 1.4),
    ("forward + backward", "spatial_sdpa", "token_mixing_gain_off", 1.4),
    ("forward", "naive_gather", "token_mixing_gain_off", 2.0),
)
"""(pass, slower, faster, at least): what the eager backend has to reach on a CPU."""


def layer_table(rows: Sequence[Row]) -> str:
    """The layers as Markdown: milliseconds, ratios with their quartiles, targets on a CPU."""
    timings: dict[str, Timings] = {}
    for row in rows:
        if "rounds_ms" in row:
            timings.setdefault(row["pass"], {})[row["contender"]] = row["rounds_ms"]
    passes = list(timings)
    lines = ["| one layer, projections included | " + " | ".join(f"{p}, ms" for p in passes) + " |"]
    lines.append("|---|" + "---:|" * len(passes))
    names = [name for name in LAYER_TITLES if any(name in of_pass for of_pass in timings.values())]
    for name in names:
        medians = (timings[p].get(name) for p in passes)
        cells = " | ".join(milliseconds(median(ms)) if ms else "–" for ms in medians)
        lines.append(f"| {LAYER_TITLES[name]} | {cells} |")
    lines += ["", "| ratio of the pairs in each round | median | quartiles | target |"]
    lines.append("|---|---:|---:|---:|")
    targets = {t[:3]: f"≥ {t[3]:.1f}×" for t in CPU_TARGETS if rows[0]["device"] == "cpu"}
    for name in ("token_mixing_gain_off", "token_mixing"):
        for one_pass, of_pass in timings.items():
            for slower in ("blip", "spatial_sdpa", "naive_gather"):
                if name not in of_pass or slower not in of_pass:
                    continue
                middle, low, high = ratio(of_pass, slower, name)
                pair = f"{LAYER_TITLES[name]}, {one_pass}: against {LAYER_TITLES[slower]}"
                target = targets.get((one_pass, slower, name), "")
                lines.append(f"| {pair} | {middle:.2f}× | {low:.2f}–{high:.2f} | {target} |")
    row = next((row for row in rows if "rounds_ms" in row), rows[0])
    lines += [
        "",
        f"{videos(row['batch'])} of {row['num_frames']} frames of {row['num_tokens']} tokens, "
        f"width {row['dim']}, {row['num_heads']} heads, {row['dtype']}; "
        f"{len(row.get('rounds_ms', ()))} rounds, contenders in turn; {machine(row)}.",
        *reasons(Results(rows)),
    ]
    return "\n".join(lines)


def operator_table(rows: Sequence[Row]) -> str:
    """Milliseconds of the operator by shape, pass and contender."""
    names = list(dict.fromkeys(row["contender"] for row in rows if "median_ms" in row))
    lines = [line("shape", "pass", *map(contender_title, names))]
    lines.append("|---|---|" + "---:|" * len(names))
    results = Results(rows)
    for shape, of_pass in order(rows):
        found = (results.find(shape, of_pass, name) for name in names)
        lines.append(line(shape, of_pass, *(f"{r['median_ms']:.3g}" if r else "" for r in found)))
    lines += ["", f"Milliseconds; {machine(rows[0])}.", *reasons(results)]
    return "\n".join(lines)


def host_table(rows: Sequence[Row]) -> str:
    """Microseconds of the host for a call."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    lines = [line("host time of a call, µs", *passes), "|---|" + "---:|" * len(passes)]
    for name in dict.fromkeys(row["contender"] for row in rows):
        cells = {
            r["pass"]: f"{r['median_us']:.1f}"
            for r in rows
            if r["contender"] == name and "median_us" in r
        }
        lines.append(line(contender_title(name), *(cells.get(p, "") for p in passes)))
    lines += ["", f"{machine(rows[0])}.", *reasons(Results(rows))]
    return "\n".join(lines)
