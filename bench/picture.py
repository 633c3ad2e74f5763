"""A picture of what a run on a GPU measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.rows import Row
from bench.targets import OTHERS, Results, order
from bench.titles import contender_title

PASSES = ("forward", "forward + backward")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of how many times faster this project's kernels are, by shape and contender."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullLocator

    results = Results(rows)
    timed = order(results.part("operator"))
    width = 0.8 / len(OTHERS)
    figure = Figure(figsize=(12, 8), layout="constrained")
    shown = {}
    for axes, of_pass in zip(figure.subplots(len(PASSES), 1), PASSES, strict=True):
        shapes = [shape for shape, its_pass in timed if its_pass == of_pass]
        # The axis shows half and twice the time even if all take as long.
        lowest, highest = 0.5, 2.0
        for number, (title, names) in enumerate(OTHERS.items()):
            bars = {
                place + number * width: found.times
                for place, shape in enumerate(shapes)
                if (found := results.ratio(shape, of_pass, names))
            }
            if bars:
                shown[title] = axes.bar(list(bars), list(bars.values()), width, color=f"C{number}")
                lowest, highest = min(lowest, *bars.values()), max(highest, *bars.values())
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_yscale("log", base=2)
        axes.set_ylim(lowest / 1.1, highest * 1.1)
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g×"))
        axes.yaxis.set_minor_locator(NullLocator())
        labels = [shape.replace(", ", ",\n") for shape in shapes]
        axes.set_xticks([place + 0.4 - width / 2 for place in range(len(shapes))], labels)
        axes.set_ylabel("times faster")
        axes.set_title(f"{of_pass}: {contender_title(results.ours)}, against")
    if shown:
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(OTHERS))
    made_up = "rehearsal with made-up times, " if rows[0].get("rehearsal") else ""
    figure.suptitle(made_up + rows[0]["hardware"])
    figure.savefig(path, dpi=120)
