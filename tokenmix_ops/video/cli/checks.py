"""The report of ``tokenmix data check`` on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenmix_ops.video.data.manifest import Problem, summary

_LISTED = 20


def show(report: dict[str, Any], problems: Sequence[Problem], console: Console) -> None:
    """Print the table, the first of each list, and what an epoch's reading takes."""
    names = list(report["splits"])
    table = Table("", *names)
    for column in table.columns[1:]:
        column.justify = "right"
    short = f"fewer than {report['num_frames']} frames"
    for row, cell in (
        *((key, f"{key}") for key in ("videos", "captions", "ok", "missing", "unreadable")),
        (short, "short"),
    ):
        table.add_row(row, *(f"{report['splits'][name][cell]:,}" for name in names))
    for row, cell, kind in (
        ("duration", "duration", span),
        ("frames", "num_frames", "{:,.0f}".format),
        ("frames a second", "fps", "{:.4g}".format),
        ("width", "width", "{:.0f}".format),
        ("height", "height", "{:.0f}".format),
    ):
        table.add_row(row, *(_range(report["splits"][name][cell], kind) for name in names))
    totals = [report["splits"][name]["duration"] for name in names]
    table.add_row("total duration", *(span(one["total"]) if one else "" for one in totals))
    console.print(table)
    unusable = [
        f"{one['split']}, {one['video_id']} ({one['path']}): {one['error']}"
        for one in report["unusable"]
    ]
    _list(unusable, f"{len(unusable):,} cannot be used", console)
    _list([f"{one.where}: {one.what}" for one in problems], summary(problems), console)
    epoch = report["epoch"]
    if epoch is not None:
        console.print(
            f"Reading one epoch of training takes about {span(epoch['seconds'])}: "
            f"{epoch['captions']:,} captions, {1000 * epoch['seconds_per_clip']:.0f} ms a clip, "
            f"{epoch['workers']} workers. This is the reading alone; the model computes meanwhile.",
            soft_wrap=True,
        )


def span(seconds: float) -> str:
    """A time for people: "6.5 s", "12 min", "3.4 h"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"


def _range(values: dict[str, float] | None, kind: Any) -> str:
    if values is None:
        return ""
    low, middle, high = (kind(values[name]) for name in ("min", "median", "max"))
    return low if low == high else f"{low} – {middle} – {high}"


def _list(lines: Sequence[str], title: str, console: Console) -> None:
    if not lines:
        return
    console.print(f"{title}:", soft_wrap=True)
    for line in lines[:_LISTED]:
        console.print(f"  {escape(line)}", soft_wrap=True)
    if len(lines) > _LISTED:
        rest = len(lines) - _LISTED
        console.print(f"  and {rest:,} more, all in --report FILE.json", soft_wrap=True)
