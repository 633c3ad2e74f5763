"""A GPU's rows of data as tables, with the targets that they meet or miss, and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenmix_ops.bench import layers
from tokenmix_ops.bench.attention import SDPA, TITLES
from tokenmix_ops.bench.measure import ratio
from tokenmix_ops.bench.suites import Row

OTHERS = {
    "eager": ("eager",),
    "naive gather": ("naive_gather",),
    "gather + best fused": (*SDPA, "xformers", "flash_attn"),
    "gather + FlexAttention": ("flex",),
    "no mixing, SDPA": ("spatial_sdpa",),
}
"""What the Triton backend is compared with: under each name, the fastest of these contenders."""
PEERS = ("naive_gather", *SDPA, "xformers", "flash_attn", "flex")


@dataclass(frozen=True)
class Ratio:
    """How many times faster one contender is than the fastest of some others: median and quartiles
    of the pairs in each round."""

    times: float
    low: float
    high: float
    slower: str

    def __str__(self) -> str:
        return f"{self.times:.2f}×"


class Results:
    """Rows by what they are about."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def find(self, shape: str, of_pass: str, contender: str) -> Row | None:
        """The timed row; None if there is none."""
        for row in self.rows:
            about = (row.get("shape"), row.get("pass"), row.get("contender"))
            if about == (shape, of_pass, contender) and "median_ms" in row:
                return row
        return None

    def ratio(
        self, shape: str, of_pass: str, others: Sequence[str], contender: str = "triton"
    ) -> Ratio | None:
        """None unless the contender and any of the others were timed."""
        faster = self.find(shape, of_pass, contender)
        found = [row for name in others if (row := self.find(shape, of_pass, name))]
        if not faster or not found:
            return None
        slower = min(found, key=lambda row: row["median_ms"])
        timings = {"slower": slower["rounds_ms"], "faster": faster["rounds_ms"]}
        return Ratio(*ratio(timings, "slower", "faster"), slower["contender"])

    def fraction(self, shape: str, of_pass: str) -> float | None:
        """Of the floor: 1 if the Triton backend takes no longer than it must."""
        row = self.find(shape, of_pass, "triton")
        return row["floor_ms"] / row["median_ms"] if row else None

    def part(self, name: str) -> list[Row]:
        return [row for row in self.rows if row["part"] == name]


Verdict = tuple[str, bool]
"""What was measured, and whether that is enough."""


@dataclass(frozen=True)
class Target:
    """A line of the table of targets."""

    text: str
    wanted: str
    judge: Callable[[Results], Verdict | None]


def _faster(
    text: str,
    shape: str,
    of_pass: str,
    others: Sequence[str],
    at_least: float,
    contender: str = "triton",
) -> Target:
    def judge(results: Results) -> Verdict | None:
        found = results.ratio(shape, of_pass, others, contender)
        if found is None:
            return None
        against = f", {_short(found.slower)}" if len(others) > 1 else ""
        return f"{found} ({found.low:.2f}–{found.high:.2f}{against})", found.times >= at_least

    return Target(text, f"≥ {at_least:g}×", judge)


def _of_floor(text: str, of_pass: str, at_least: float) -> Target:
    def judge(results: Results) -> Verdict | None:
        found = results.fraction("main", of_pass)
        return None if found is None else (f"{found:.0%}", found >= at_least)

    return Target(text, f"≥ {at_least:.0%}", judge)


def _memory(of_pass: str) -> Target:
    def judge(results: Results) -> Verdict | None:
        row = results.find("main", of_pass, "triton")
        if row is None or "extra_mb" not in row:
            return None
        queries = row["batch"] * row["num_frames"] * row["num_tokens"] * row["num_heads"]
        # The allocator may hand out blocks that are larger than what was asked for by 1 MiB each.
        return f"{row['extra_mb']:.1f} MB", row["extra_mb"] <= 4 * queries / 1e6 + 2.1

    text = f"memory of a {of_pass} pass beyond inputs and results"
    return Target(text, "a float32 for each query", judge)


def _deterministic(results: Results) -> Verdict | None:
    row = results.find("main", "backward", "triton")
    if row is None:
        return None
    same = row["deterministic"]
    return "the same bits twice" if same else "other bits the second time", same


def _host(results: Results) -> Verdict | None:
    for row in results.part("host"):
        if (row["contender"], row["pass"]) == ("triton", "no autograd") and "median_us" in row:
            return f"{row['median_us']:.1f} µs", row["median_us"] <= 15
    return None


TARGETS = (
    _faster("forward against the naive gather", "main", "forward", ["naive_gather"], 15),
    _faster(
        "forward against gather + the best SDPA backend, gain off",
        "main, gain off",
        "forward",
        list(SDPA),
        1.5,
    ),
    _faster("forward against gather + FlexAttention", "main", "forward", ["flex"], 1.5),
    _faster("forward + backward against the best peer", "main", "forward + backward", PEERS, 1.4),
    _faster(
        "forward + backward against the best peer, gain off",
        "main, gain off",
        "forward + backward",
        PEERS,
        1.4,
    ),
    _of_floor("forward, fraction of the floor", "forward", 0.6),
    _of_floor("backward, fraction of the floor", "backward", 0.5),
    _faster(
        "S = 577, gain off: forward against cuDNN SDPA on keys already selected",
        "S = 577, gain off",
        "forward",
        ["cudnn_selected"],
        1,
    ),
    _faster(
        "adjacent: forward against gather + the best SDPA backend",
        "adjacent",
        "forward",
        list(SDPA),
        2,
    ),
    _faster(
        "whole layer: forward + backward against plain spatial attention with SDPA",
        "layer, B = 64",
        "forward + backward",
        ["spatial_sdpa"],
        1.5,
        "token_mixing",
    ),
    _memory("forward"),
    _memory("backward"),
    Target("backward, twice over the same inputs", "the same bits", _deterministic),
    Target("host, one call without autograd", "≤ 15 µs", _host),
)
"""What has to be reached on one H200; shapes without a word are the main one, with the gain."""


def gpu_table(rows: Sequence[Row]) -> str:
    """The GPU suite as Markdown: targets, shapes, layers, the host, what did not run, and where."""
    results = Results(rows)
    lines = ["| target | measured | wanted | |", "|---|---:|---:|---|"]
    for target in TARGETS:
        verdict = target.judge(results)
        shown, met = verdict or ("not measured", False)
        word = "" if verdict is None else "met" if met else "short"
        lines.append(f"| {target.text} | {shown} | {target.wanted} | {word} |")
    lines += ["", *_shapes(results), "", *_layers(results), "", *_host_line(results)]
    lines += [*_reasons(results), "", _where(results)]
    return "\n".join(lines)


def _shapes(results: Results) -> list[str]:
    lines = ["| shape | pass | Triton, ms | of the floor | " + " | ".join(OTHERS) + " |"]
    lines.append("|---|---|---:|---:|" + "---:|" * len(OTHERS))
    for shape, of_pass in _order(results.part("operator")):
        row = results.find(shape, of_pass, "triton")
        if row is None:
            continue
        cells = []
        for names in OTHERS.values():
            found = results.ratio(shape, of_pass, names)
            best = f", {_short(found.slower)}" if found and len(names) > 1 else ""
            cells.append(f"{found}{best}" if found else "")
        fraction = results.fraction(shape, of_pass)
        lines.append(
            f"| {shape} | {of_pass} | {row['median_ms']:.3g} | {fraction:.0%} | "
            + " | ".join(cells)
            + " |"
        )
    return lines


def _layers(results: Results) -> list[str]:
    others = ("spatial_sdpa", "naive_gather", "blip")
    titles = [f"against {layers.TITLES[name]}" for name in others]
    lines = ["| one layer, projections included | pass | ms | " + " | ".join(titles) + " |"]
    lines.append("|---|---|---:|" + "---:|" * len(others))
    for shape, of_pass in _order(results.part("layer")):
        for name in ("token_mixing", "token_mixing_gain_off"):
            row = results.find(shape, of_pass, name)
            if row is not None:
                ratios = [results.ratio(shape, of_pass, [other], name) for other in others]
                cells = " | ".join(str(found or "") for found in ratios)
                title = f"{layers.TITLES[name]}, {shape.removeprefix('layer, ')}"
                lines.append(f"| {title} | {of_pass} | {row['median_ms']:.3g} | {cells} |")
    return lines


def _host_line(results: Results) -> list[str]:
    times = [
        f"{row['contender']}, {row['pass']} {row['median_us']:.1f}"
        for row in results.part("host")
        if "median_us" in row
    ]
    return [f"Microseconds of the host for a call: {'; '.join(times)}.", ""] if times else []


def _reasons(results: Results) -> list[str]:
    """What did not run, by reason, in which shapes."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for row in results.rows:
        if "reason" in row:
            names = found.setdefault(row["reason"], {"who": {}, "where": {}})
            names["who"][_title(row["contender"])] = None
            names["where"][row.get("shape") or row["part"]] = None
    return [
        f"- Not run: {'; '.join(names['who'])} ({'; '.join(names['where'])}): {why}"
        for why, names in found.items()
    ]


def _where(results: Results) -> str:
    row = results.rows[0]
    rates = [f"{r['tflops']:.0f} TFLOP/s in {r['dtype']}" for r in results.part("ceilings")]
    copied = next((r["terabytes_per_s"] for r in results.part("ceilings")), None)
    measured = f"copy {copied:.2f} TB/s, matrix product {', '.join(rates)}; " if rates else ""
    return (
        "B = 64 videos of T = 8 frames of S = 197 tokens, H = 12 heads of 64, bfloat16, gain 0.8, "
        "but for what the shape says; × is how many times faster the Triton backend is, median of "
        "the pairs in each round, contenders in turn on rotating inputs. Ceilings of the same run: "
        f"{measured}{row['hardware']}, driver {row['driver']}, CUDA {row['cuda']}, cuDNN "
        f"{row['cudnn']}, PyTorch {row['torch']}, Triton {row['triton']}, tokenmix_ops "
        f"{row['tokenmix_ops']} at {row['commit']}, {row['date']}; tests {row['tests']} there."
    )


def _order(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Shapes and passes, as they were measured."""
    return list(dict.fromkeys((row["shape"], row["pass"]) for row in rows))


def _short(contender: str) -> str:
    return _title(contender).removeprefix("gather + SDPA, ").removeprefix("gather + ")


def _title(contender: str) -> str:
    return TITLES.get(contender) or layers.TITLES.get(contender, contender)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of how many times faster the Triton backend is, by shape and contender."""
    from matplotlib.figure import Figure

    results = Results(rows)
    order = _order(results.part("operator"))
    passes = ("forward", "forward + backward")
    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, of_pass in zip(figure.subplots(len(passes), 1), passes, strict=True):
        shapes = [shape for shape, timed in order if timed == of_pass]
        width = 0.8 / len(OTHERS)
        for number, (title, names) in enumerate(OTHERS.items()):
            bars = [
                (place + number * width, found.times)
                for place, shape in enumerate(shapes)
                if (found := results.ratio(shape, of_pass, names))
            ]
            heights = [times for _, times in bars]
            axes.bar([x for x, _ in bars], heights, width, label=title, color=f"C{number}")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_yscale("log")
        labels = [shape.replace(", ", ",\n") for shape in shapes]
        axes.set_xticks([place + 0.4 - width / 2 for place in range(len(shapes))], labels)
        axes.set_ylabel("times faster")
        axes.set_title(f"{of_pass}: the Triton backend against")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(OTHERS))
    figure.suptitle(rows[0]["hardware"])
    figure.savefig(path, dpi=120)
