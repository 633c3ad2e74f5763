"""What layers, the operator and calls take, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from bench.rows import Row
from bench.tables.layout import line, machine, milliseconds, reasons, videos
from bench.targets import Results, order
from bench.titles import contender_title
from tokenmix_ops.peer_layers import LAYER_TITLES
from tokenmix_ops.timing import Timings, ratio


def layer_table(rows: Sequence[Row]) -> str:
    """The layers as Markdown: milliseconds, and ratios with their quartiles."""
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
    lines += ["", "| ratio of the pairs in each round | median | quartiles |"]
    lines.append("|---|---:|---:|")
    for name in ("token_mixing_gain_off", "token_mixing"):
        for one_pass, of_pass in timings.items():
            for slower in ("blip", "spatial_sdpa", "naive_gather", f"eager_{name}"):
                if name not in of_pass or slower not in of_pass:
                    continue
                middle, low, high = ratio(of_pass, slower, name)
                pair = f"{LAYER_TITLES[name]}, {one_pass}: against {LAYER_TITLES[slower]}"
                lines.append(f"| {pair} | {middle:.2f}× | {low:.2f}–{high:.2f} |")
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


def tower_table(rows: Sequence[Row]) -> str:
    """Milliseconds of whole towers by number of videos, and how many times faster than
    transformers' own."""
    results = Results(rows)
    shapes = [shape for shape, _ in order(rows)]
    titles = [f"{shape}: {what}" for shape in shapes for what in ("ms", "against transformers'")]
    lines = [line("BLIP ViT-B/16, vision tower", *titles), "|---|" + "---:|" * len(titles)]
    for name in dict.fromkeys(row["contender"] for row in rows):
        cells = []
        for shape in shapes:
            row = results.find(shape, "forward", name)
            found = results.ratio(shape, "forward", ["transformers"], name)
            shown = f"{found} ({found.low:.2f}–{found.high:.2f})" if found else ""
            cells += [milliseconds(row["median_ms"]) if row else "", shown]
        lines.append(line(contender_title(name), *cells))
    row = next((row for row in rows if "rounds_ms" in row), rows[0])
    lines += [
        "",
        f"Inference over B videos of {row['num_frames']} frames at {row['image_size']} pixels, "
        f"{row['dtype']}, random weights; {len(row.get('rounds_ms', ()))} rounds, towers in turn; "
        f"{machine(row)}.",
        *reasons(results),
    ]
    return "\n".join(lines)
