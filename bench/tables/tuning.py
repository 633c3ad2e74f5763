"""Time and memory of fine-tuning, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from bench.rows import Row
from bench.tables.layout import line, videos
from tokenmix_ops.timing import ratio

KINDS = ("parameters", "gradients", "optimiser states", "activations", "temporary")
"""What memory is for, as rows tell it apart."""

TOKEN_MIXING = "token_mixing (P)"
FROZEN_PATCHES = "token_mixing (P), patch embedding frozen"
PAPER_GB = {
    "full": 28.6,
    "dual_attention": 25.9,
    "st_adapter": 21.9,
    "temporal": 22.5,
    "adapter": 21.3,
    "bitfit": 18.2,
    TOKEN_MIXING: 20.2,
}
"""GB a GPU while training, as the paper's Table 1 prints them."""


class Column(NamedTuple):
    """A way of computing in a type, and what it is called."""

    way: str
    dtype: str
    title: str


COLUMNS = (
    Column("tokenmix_ops", "bfloat16", "bf16"),
    Column("tokenmix_ops", "float32", "float32"),
    Column("published", "float32", "authors' way, float32"),
    Column("published", "bfloat16", "authors' way, bf16"),
)

Table = dict[tuple[str, Column], Row]


def memory_table(rows: Sequence[Row]) -> str:
    """The peaks by method and way beside the paper's Table 1, the orders compared, and the split of
    the peaks in bfloat16."""
    found = _by_column(rows)
    titles = [f"{column.title}, GiB" for column in COLUMNS]
    lines = [line("fine-tuning by", "updated in all, M", *titles, "paper, GB")]
    lines.append("|---|" + "---:|" * (2 + len(COLUMNS)))
    for name in _names(rows):
        peaks = [_figure(found.get((name, column)), "peak_gib", ".1f") for column in COLUMNS]
        updated = next(row["updated"] for row in rows if row["run"] == name)
        lines.append(line(name, f"{updated / 1e6:.2f}", *peaks, PAPER_GB.get(name, "")))
    lines += ["", line("order of the paper's methods", "rank correlation", "pairs out of order")]
    lines.append("|---|---:|---|")
    for column in COLUMNS:
        peaks_of = {
            name: found[name, column]["peak_gib"] for name in PAPER_GB if (name, column) in found
        }
        if peaks_of.keys() == PAPER_GB.keys():
            pairs = ", ".join(" and ".join(pair) for pair in out_of_order(peaks_of, PAPER_GB))
            correlation = f"{rank_correlation(peaks_of, PAPER_GB):.2f}"
            lines.append(line(column.title, correlation, pairs or "none"))
    first = COLUMNS[0]
    lines += ["", line(f"at the peak, {first.title}, GiB", *KINDS)]
    lines.append("|---|" + "---:|" * len(KINDS))
    for name in _names(rows):
        if row := found.get((name, first)):
            lines.append(line(name, *(f"{row[kind]:.2f}" for kind in KINDS)))
    row = rows[0]
    lines += [
        "",
        "Computed with fake tensors, not measured on a GPU: the storages that live at the peak of "
        f"an update by AdamW, {_size(row)}. A kernel's own scratch memory, the allocator's "
        "fragments and the CUDA context are not in it, as they may be in the paper's figures; "
        '"temporary" is what a backward pass or the optimiser holds at that moment besides. '
        f"PyTorch {row['torch']}, tokenmix_ops {row['tokenmix_ops']} at {row['commit']}, "
        f"{row['date']}.",
    ]
    return "\n".join(lines)


def rank_correlation(found: Mapping[str, float], paper: Mapping[str, float]) -> float:
    """Spearman's, of two orders of the same names; equal figures share no rank."""
    places = [
        {name: i for i, name in enumerate(sorted(f, key=f.__getitem__))} for f in (found, paper)
    ]
    squares = sum((places[0][name] - places[1][name]) ** 2 for name in paper)
    return 1 - 6 * squares / (len(paper) * (len(paper) ** 2 - 1))


def out_of_order(found: Mapping[str, float], paper: Mapping[str, float]) -> list[tuple[str, str]]:
    """The pairs of which the paper's smaller one is not the smaller one."""
    ordered = sorted(paper, key=paper.__getitem__)
    return [(a, b) for a, b in combinations(ordered, 2) if not found[a] < found[b]]


def training_table(rows: Sequence[Row]) -> str:
    """Steps per second and peak memory by method and way, and the ratios with their targets."""
    found = _by_column(rows)
    columns = [c for c in COLUMNS if any(column == c for _, column in found)]
    figures = [("steps_per_s", "steps/s", ".3g")]
    if any("peak_gib" in row for row in rows):
        figures.append(("peak_gib", "GiB", ".1f"))
    titles = [f"{column.title}, {unit}" for column in columns for _, unit, _ in figures]
    on_gpu = rows[0]["device"] != "cpu"
    where = f" on {rows[0]['hardware']}" if on_gpu else ""
    lines = [line(f"fine-tuning{where} by", *titles), "|---|" + "---:|" * len(titles)]
    for name in _names(rows):
        cells = [
            _figure(found.get((name, column)), key, form)
            for column in columns
            for key, _, form in figures
        ]
        lines.append(line(name, *cells))
    lines += [
        "",
        line(f"ratio of steps per second{where}, pairs of each round", "", "quartiles", "target"),
    ]
    lines.append("|---|---:|---:|---|")
    ours = columns[0]
    published = Column("published", "float32", "")
    for title, slower, faster, target in (
        (
            f"{TOKEN_MIXING} against the authors' way in float32",
            _timed(rows, TOKEN_MIXING, published),
            _timed(rows, TOKEN_MIXING, ours),
            3.0,
        ),
        (
            "with the patch embedding frozen, against updating it",
            _timed(rows, TOKEN_MIXING, ours),
            _timed(rows, FROZEN_PATCHES, ours),
            2.0,
        ),
    ):
        if slower and faster:
            timings = {"slower": slower["rounds_ms"], "faster": faster["rounds_ms"]}
            middle, low, high = ratio(timings, "slower", "faster")
            verdict = f"≥ {target:.0f}×, {'met' if middle >= target else 'short'}" if on_gpu else ""
            lines.append(line(title, f"{middle:.2f}×", f"{low:.2f}–{high:.2f}", verdict))
    row = rows[0]
    device = [str(row["hardware"])]
    device += [f"driver {row['driver']}", f"CUDA {row['cuda']}"] if on_gpu else []
    device += [] if on_gpu else [f"{row['threads']} threads"]
    failed = dict.fromkeys(
        f"- Not run: {r['run']}, {r['way']}, {r['dtype']}: {r['reason']}"
        for r in rows
        if "reason" in r
    )
    lines += [
        "",
        f"Whole updates by AdamW on random data, {_size(row)}; {', '.join(device)}, PyTorch "
        f"{row['torch']}, tokenmix_ops {row['tokenmix_ops']} at {row['commit']}, {row['date']}.",
        *failed,
    ]
    return "\n".join(lines)


def _by_column(rows: Sequence[Row]) -> Table:
    columns = {(column.way, column.dtype): column for column in COLUMNS}
    return {(row["run"], columns[row["way"], row["dtype"]]): row for row in rows}


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["run"] for row in rows))


def _timed(rows: Sequence[Row], name: str, column: Column) -> Row | None:
    """The run's row of the heat in which the targets' runs took turns."""
    for row in rows:
        about = (row["heat"], row["run"], row["way"], row["dtype"])
        if about == ("targets", name, column.way, column.dtype) and "rounds_ms" in row:
            return row
    return None


def _figure(row: Row | None, key: str, form: str) -> str:
    if row is None:
        return ""
    return format(row[key], form) if key in row else "–"


def _size(row: Row) -> str:
    depth = row["vision"].get("num_hidden_layers", 12), row["text"].get("num_hidden_layers", 12)
    model = "BLIP ViT-B/16"
    if depth != (12, 12):
        model += f" cut to {depth[0]} layers, its decoder to {depth[1]},"
    side = row["image_size"]
    return (
        f"{model} captioning {videos(row['batch'])} of {row['num_frames']} frames of "
        f"{side}×{side} with captions of {row['length']} tokens"
    )
