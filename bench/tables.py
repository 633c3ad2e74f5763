"""Rows of data as Markdown tables, one function for each kind of result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import NamedTuple

from bench.rows import Row
from bench.targets import OTHERS, TARGETS, Results, contender_title, order, short
from tokenmix_ops.peers import LAYER_TITLES
from tokenmix_ops.timing import Timings, ratio

CPU_TARGETS = (
    ("forward", "spatial_sdpa", "token_mixing_gain_off", 1.4),
    ("forward + backward", "spatial_sdpa", "token_mixing_gain_off", 1.4),
    ("forward", "naive_gather", "token_mixing_gain_off", 2.0),
)
"""(pass, slower, faster, at least): what the eager backend has to reach on a CPU."""

WORLD_COLUMNS = {
    "captioning": ("motion", "BLEU-4", "CIDEr"),
    "retrieval": ("order", "R@1", "R@5"),
}
RERANK_TITLES = {
    "once_a_video": "once a video",
    "for_every_text_fused": "again for every text, fused",
    "for_every_text": "again for every text, transformers",
}

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
        cells = " | ".join(_milliseconds(median(ms)) if ms else "–" for ms in medians)
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
        f"{_videos(row['batch'])} of {row['num_frames']} frames of {row['num_tokens']} tokens, "
        f"width {row['dim']}, {row['num_heads']} heads, {row['dtype']}; "
        f"{len(row.get('rounds_ms', ()))} rounds, contenders in turn; {_machine(row)}.",
        *_reasons(Results(rows)),
    ]
    return "\n".join(lines)


def _milliseconds(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.3g}"


def operator_table(rows: Sequence[Row]) -> str:
    """Milliseconds of the operator by shape, pass and contender."""
    names = list(dict.fromkeys(row["contender"] for row in rows if "median_ms" in row))
    lines = [_line("shape", "pass", *map(contender_title, names))]
    lines.append("|---|---|" + "---:|" * len(names))
    results = Results(rows)
    for shape, of_pass in order(rows):
        found = (results.find(shape, of_pass, name) for name in names)
        lines.append(_line(shape, of_pass, *(f"{r['median_ms']:.3g}" if r else "" for r in found)))
    lines += ["", f"Milliseconds; {_machine(rows[0])}.", *_reasons(results)]
    return "\n".join(lines)


def host_table(rows: Sequence[Row]) -> str:
    """Microseconds of the host for a call."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    lines = [_line("host time of a call, µs", *passes), "|---|" + "---:|" * len(passes)]
    for name in dict.fromkeys(row["contender"] for row in rows):
        cells = {
            r["pass"]: f"{r['median_us']:.1f}"
            for r in rows
            if r["contender"] == name and "median_us" in r
        }
        lines.append(_line(contender_title(name), *(cells.get(p, "") for p in passes)))
    lines += ["", f"{_machine(rows[0])}.", *_reasons(Results(rows))]
    return "\n".join(lines)


def _machine(row: Row) -> str:
    threads = f", {row['threads']} threads" if "threads" in row else ""
    return (
        f"{row['hardware']}{threads}, PyTorch {row['torch']}, tokenmix_ops {row['tokenmix_ops']} "
        f"at {row['commit']}, {row['date']}"
    )


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
    lines = [_line(*names, *titles, "busiest", "warps wait for", "µs", "floor")]
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
        lines.append(_line(*cells))
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


def gpu_table(rows: Sequence[Row]) -> str:
    """The GPU suite as Markdown: targets, shapes, layers, the host, what did not run, and where.

    ValueError if the rows are of more than one card.
    """
    results = Results(rows)
    rehearsed = any(row.get("rehearsal") for row in rows)
    lines = [f"| target, on {results.hardware} | measured | wanted | |", "|---|---:|---:|---|"]
    for target in TARGETS:
        verdict = target.judge(results)
        shown, met = verdict or ("not measured", False)
        word = "" if verdict is None or rehearsed else "met" if met else "short"
        lines.append(f"| {target.text} | {shown} | {target.wanted} | {word} |")
    lines += ["", *_shapes(results), "", *_gpu_layers(results), "", *_host_line(results)]
    lines += [*_reasons(results), "", REHEARSED if rehearsed else _where(results)]
    return "\n".join(lines)


REHEARSED = (
    "A rehearsal on a CPU: every shape is tiny, and times are made up, a second for each call. "
    "Nothing here was measured."
)


def _shapes(results: Results) -> list[str]:
    titles = (f"shape, on {results.hardware}", "pass", "Triton, ms", "of the floor", *OTHERS)
    lines = [_line(*titles)]
    lines.append("|---|---|---:|---:|" + "---:|" * len(OTHERS))
    for shape, of_pass in order(results.part("operator")):
        row = results.find(shape, of_pass, "triton")
        if row is None:
            continue
        cells = []
        for names in OTHERS.values():
            found = results.ratio(shape, of_pass, names)
            best = f", {short(found.slower)}" if found and len(names) > 1 else ""
            cells.append(f"{found}{best}" if found else "")
        fraction = results.fraction(shape, of_pass)
        lines.append(
            f"| {shape} | {of_pass} | {row['median_ms']:.3g} | {fraction:.0%} | "
            + " | ".join(cells)
            + " |"
        )
    return lines


def _gpu_layers(results: Results) -> list[str]:
    others = ("spatial_sdpa", "naive_gather", "blip")
    titles = [f"against {LAYER_TITLES[name]}" for name in others]
    lines = [_line(f"one layer with its projections, on {results.hardware}", "pass", "ms", *titles)]
    lines.append("|---|---|---:|" + "---:|" * len(others))
    for shape, of_pass in order(results.part("layer")):
        for name in ("token_mixing", "token_mixing_gain_off"):
            row = results.find(shape, of_pass, name)
            if row is not None:
                ratios = [results.ratio(shape, of_pass, [other], name) for other in others]
                cells = " | ".join(str(found or "") for found in ratios)
                title = f"{LAYER_TITLES[name]}, {shape.removeprefix('layer, ')}"
                lines.append(f"| {title} | {of_pass} | {row['median_ms']:.3g} | {cells} |")
    return lines


def _host_line(results: Results) -> list[str]:
    times = [
        f"{row['contender']}, {row['pass']} {row['median_us']:.1f}"
        for row in results.part("host")
        if "median_us" in row
    ]
    of_call = f"Microseconds of the host for a call, beside {results.hardware}"
    return [f"{of_call}: {'; '.join(times)}.", ""] if times else []


def _reasons(results: Results) -> list[str]:
    """What did not run, by reason, in which shapes."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for row in results.rows:
        if "reason" in row:
            names = found.setdefault(row["reason"], {"who": {}, "where": {}})
            names["who"][contender_title(row["contender"])] = None
            names["where"][row.get("shape") or row.get("part") or row["pass"]] = None
    return [
        f"- Not run: {'; '.join(names['who'])} ({'; '.join(names['where'])}): {why}"
        for why, names in found.items()
    ]


def _where(results: Results) -> str:
    row = results.rows[0]
    counted = [r for r in results.part("tests") if "passed" in r]
    tests = (
        "; tests there: {passed} passed, {failed} failed, {skipped} skipped".format(**counted[-1])
        if counted
        else ""
    )
    rates = [f"{r['tflops']:.0f} TFLOP/s in {r['dtype']}" for r in results.part("ceilings")]
    copied = next((r["terabytes_per_s"] for r in results.part("ceilings")), None)
    measured = f"copy {copied:.2f} TB/s, matrix product {', '.join(rates)}; " if rates else ""
    return (
        "B = 64 videos of T = 8 frames of S = 197 tokens, H = 12 heads of 64, bfloat16, gain 0.8, "
        "unless the shape says otherwise; × is the Triton backend's speed-up, median of "
        "the pairs in each round, contenders in turn on rotating inputs. Where there is a gain, "
        "fused attention that knows none gets one set of scaled keys for each frame. Floors follow "
        f"from the ceilings of the same run: {measured}{row['hardware']}, driver {row['driver']}, "
        f"CUDA {row['cuda']}, cuDNN {row['cudnn']}, PyTorch {row['torch']}, Triton "
        f"{row['triton']}, tokenmix_ops {row['tokenmix_ops']} at {row['commit']}, "
        f"{row['date']}{tests}."
    )


def memory_table(rows: Sequence[Row]) -> str:
    """The peaks by method and way beside the paper's Table 1, the orders compared, and the split of
    the peaks in bfloat16."""
    found = _by_column(rows)
    titles = [f"{column.title}, GiB" for column in COLUMNS]
    lines = [_line("fine-tuning by", "updated in all, M", *titles, "paper, GB")]
    lines.append("|---|" + "---:|" * (2 + len(COLUMNS)))
    for name in _names(rows):
        peaks = [_figure(found.get((name, column)), "peak_gib", ".1f") for column in COLUMNS]
        updated = next(row["updated"] for row in rows if row["run"] == name)
        lines.append(_line(name, f"{updated / 1e6:.2f}", *peaks, PAPER_GB.get(name, "")))
    lines += ["", _line("order of the paper's methods", "rank correlation", "pairs out of order")]
    lines.append("|---|---:|---|")
    for column in COLUMNS:
        peaks_of = {
            name: found[name, column]["peak_gib"] for name in PAPER_GB if (name, column) in found
        }
        if peaks_of.keys() == PAPER_GB.keys():
            pairs = ", ".join(" and ".join(pair) for pair in out_of_order(peaks_of, PAPER_GB))
            correlation = f"{rank_correlation(peaks_of, PAPER_GB):.2f}"
            lines.append(_line(column.title, correlation, pairs or "none"))
    first = COLUMNS[0]
    lines += ["", _line(f"at the peak, {first.title}, GiB", *KINDS)]
    lines.append("|---|" + "---:|" * len(KINDS))
    for name in _names(rows):
        if row := found.get((name, first)):
            lines.append(_line(name, *(f"{row[kind]:.2f}" for kind in KINDS)))
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
    lines = [_line(f"fine-tuning{where} by", *titles), "|---|" + "---:|" * len(titles)]
    for name in _names(rows):
        cells = [
            _figure(found.get((name, column)), key, form)
            for column in columns
            for key, _, form in figures
        ]
        lines.append(_line(name, *cells))
    lines += [
        "",
        _line(f"ratio of steps per second{where}, pairs of each round", "", "quartiles", "target"),
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
            lines.append(_line(title, f"{middle:.2f}×", f"{low:.2f}–{high:.2f}", verdict))
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
        f"{model} captioning {_videos(row['batch'])} of {row['num_frames']} frames of "
        f"{side}×{side} with captions of {row['length']} tokens"
    )


def _videos(number: int) -> str:
    return "1 video" if number == 1 else f"{number} videos"


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def world_table(rows: Sequence[Row]) -> str:
    """What each method reached, task by task."""
    lines = []
    for task, columns in WORLD_COLUMNS.items():
        of_task = [row for row in rows if row["task"] == task]
        if not of_task:
            continue
        lines += [f"| {task}, tuned by | " + " | ".join(columns) + " | epochs | rate | minutes |"]
        lines.append("|---|" + "---:|" * (len(columns) + 3))
        for row in of_task:
            figures = " | ".join(f"{row[column]:.1f}" for column in columns)
            effort = " | | "
            if row["minutes"]:
                epochs, rate = row["world"]["epochs"], row["world"]["learning_rate"]
                effort = f" {epochs} | {rate:g} | {row['minutes']:.0f} "
            lines.append(f"| {row['contender']} | {figures} |{effort}|")
        lines.append("")
    row = rows[0]
    world = row["world"]
    lines.append(
        "Test clips, percent. motion: the caption names the right one of four motions. order: the "
        "clip is nearer to its caption than to the one that says the reverse; chance is 50. Who "
        "cannot see the order of frames may still see the axis of a motion, and name the right "
        "motion half of the time. "
        f"{world['clips']} clips, after {world['still_epochs']} epochs on still frames of "
        f"{world['stills']}; one run each, with other work on the machine. {row['hardware']}, "
        f"PyTorch {row['torch']}, tokenmix_ops {row['tokenmix_ops']}, row by row at "
        f"{', '.join(row['commit'] for row in rows)}, {row['date']}."
    )
    return "\n".join(lines)


def rerank_table(rows: Sequence[Row]) -> str:
    """Milliseconds, and how many times faster keys and values are that are computed once."""
    lines = ["| keys and values of a video | ms | against once a video |", "|---|---:|---:|"]
    for row in rows:
        low, high = row["ratio_quartiles"]
        ratio = "" if row["contender"] == "once_a_video" else f"{row['ratio']:.1f}× ({low}–{high})"
        lines.append(f"| {RERANK_TITLES[row['contender']]} | {row['median_ms']:.0f} | {ratio} |")
    row = rows[0]
    each = "each of " if row["videos"] > 1 else ""
    lines += [
        "",
        f"{row['texts']} texts of {row['length']} tokens matched with {each}"
        f"{_videos(row['videos'])} of {row['num_frames']} frames of {row['num_tokens']} tokens, "
        f"{row['num_layers']} layers of width {row['dim']}, {row['dtype']}; median and quartiles "
        f"of {len(row['rounds_ms'])} rounds, contenders in turn; target ≥ 5×. {row['hardware']}, "
        f"PyTorch {row['torch']}, tokenmix_ops {row['tokenmix_ops']} at {row['commit']}, "
        f"{row['date']}.",
    ]
    return "\n".join(lines)


def search_table(rows: Sequence[Row]) -> str:
    """How often what is found is what the query describes, by retriever and ranking."""
    lines = [
        "| retriever | re-ranked | first hit right | one of five right | colour | shape | motion |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        figures = (row[name] for name in ("top_1", "top_5", "colour", "shape", "motion"))
        cells = " | ".join(f"{figure:.1f}" for figure in figures)
        lines.append(f"| {row['checkpoint']} | {row['rerank'] or 'no'} | {cells} |")
    row = rows[0]
    same = all(row["same_index_after_a_kill"] for row in rows)
    lines += [
        "",
        f"{row['clips']} new clips, each of their captions a query, percent; colour, shape and "
        "motion are those of the first hit. A clip drawn at random is right in "
        f"{row['chance_1']:.1f} %, one of five in {row['chance_5']:.1f} %. Indexed in "
        f"{row['index_seconds']:.1f} s; after a kill midway the index was "
        f"{'the same to the last bit' if same else 'NOT the same'}. {row['hardware']}, "
        f"{row['threads']} threads, PyTorch {row['torch']}, tokenmix_ops {row['tokenmix_ops']} at "
        f"{row['commit']}, {row['date']}.",
    ]
    return "\n".join(lines)


def loading_table(rows: Sequence[Row]) -> str:
    """Clips a second by way of reading, the start of workers, and memory over many clips."""
    lines = ["| clips drawn from | workers | clips a second | rounds |", "|---|---:|---:|---:|"]
    for row in (row for row in rows if row["measure"] == "speed"):
        source = "all frames" if row["fps"] is None else f"{row['fps']:g} frames a second"
        kept = {None: "", "cold": ", filling the cache", "warm": ", from the cache"}[row["cache"]]
        low, high = min(row["rounds"]), max(row["rounds"])
        lines.append(
            f"| {source}{kept} | {row['workers']} | {row['clips_per_second']:.1f} | "
            f"{low:.1f}–{high:.1f} |"
        )
    of_memory = [row for row in rows if row["measure"] == "memory"]
    if of_memory:
        marks = list(of_memory[0]["mib"])
        heads = " | ".join(f"after {mark} %" for mark in marks)
        title = f"MiB of all processes over {of_memory[0]['clips']:,} clips"
        lines += [
            "",
            f"| {title} | {heads} | growth | peak |",
            "|---|" + "---:|" * (len(marks) + 2),
        ]
        for row in of_memory:
            figures = [row["mib"][mark] for mark in marks] + [row["growth_mib"], row["peak_mib"]]
            source = "decoded" if row["cache"] is None else "from the cache"
            lines.append(f"| {source} | " + " | ".join(str(round(mib)) for mib in figures) + " |")
    row = rows[0]
    starts = [f"{other['seconds']:.1f} s by {other['start']}" for other in rows if "start" in other]
    lines += [
        "",
        f"{row['num_frames']} random frames at {row['size']} pixels of H.264 files, "
        f"{_files(row)}{f'; for memory {_files(of_memory[0])}' if of_memory else ''}; median of "
        f"{len(row['rounds'])} rounds, ways in turn. Two workers have their first clip after "
        f"{', '.join(starts)}. Memory is the {of_memory[0]['kind'] if of_memory else 'set'}. "
        f"{row['hardware']}, {row['threads']} threads, PyTorch {row['torch']}, PyAV {row['av']}, "
        f"tokenmix_ops {row['tokenmix_ops']} at {row['commit']}, {row['date']}.",
    ]
    return "\n".join(lines)


def _files(row: Row) -> str:
    like = row["videos"]
    return f"{like['width']}×{like['height']}, {like['seconds']:g} s at {like['rate']} a second"


TABLES = {
    "aot": aot_table,
    "gpu": gpu_table,
    "host": host_table,
    "layer": layer_table,
    "loading": loading_table,
    "memory": memory_table,
    "operator": operator_table,
    "rehearsal": gpu_table,
    "rerank": rerank_table,
    "search": search_table,
    "training": training_table,
    "world": world_table,
}
