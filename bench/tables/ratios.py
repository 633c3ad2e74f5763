"""Targets and speed-ups by shape, which the tables of GPUs and of CPUs share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from bench.rows import Row
from bench.tables.layout import line
from bench.targets import OTHERS, Results, Verdict, order
from bench.titles import short


def target_lines(
    where: str, judged: Iterable[tuple[str, str, Verdict | None]], claims: bool = True
) -> list[str]:
    """A line for each (target, wanted, verdict); what is met, if this is to be claimed."""
    lines = [f"| target, on {where} | measured | wanted | |", "|---|---:|---:|---|"]
    for text, wanted, verdict in judged:
        shown, met = verdict or ("not measured", False)
        word = "" if verdict is None or not claims else "met" if met else "short"
        lines.append(line(text, shown, wanted, word))
    return lines


def shape_lines(
    where: str, results: Results, figures: Mapping[str, Callable[[Row], str]]
) -> list[str]:
    """A line for each shape and pass of our kernels: ``figures`` by title, and how many times
    faster they are than each of `OTHERS`."""
    lines = [line(f"shape, on {where}", "pass", *figures, *OTHERS)]
    lines.append("|---|---|" + "---:|" * (len(figures) + len(OTHERS)))
    for shape, of_pass in order(results.part("operator")):
        row = results.find(shape, of_pass, results.ours)
        if row is None:
            continue
        cells = [figure(row) for figure in figures.values()]
        for names in OTHERS.values():
            found = results.ratio(shape, of_pass, names)
            best = f", {short(found.slower)}" if found and len(names) > 1 else ""
            cells.append(f"{found}{best}" if found else "")
        lines.append(line(shape, of_pass, *cells))
    return lines
