"""Figures on a terminal, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenmix_ops.video.metrics.captions import CaptionScores


def show(figures: Mapping[str, Any], *, as_json: bool) -> None:
    """Prints figures as JSON, or as a table with one figure per row."""
    if as_json:
        print(json.dumps(figures))
        return
    shown = {name: value for name, value in figures.items() if name not in ("update", "score")}
    table = Table.grid(padding=(0, 2))
    for name, value in shown.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    Console().print(table)


def show_scores(scores: CaptionScores, *, as_json: bool, **more: int) -> None:
    """Prints caption scores, and on standard error why one is missing."""
    row = scores.row()
    if not as_json:
        row = {name: row[name] for name in row if name in (*scores.figures, "tokenizer")}
    show({**row, **more}, as_json=as_json)
    for name, reason in scores.missing.items():
        print(f"{name} {reason}", file=sys.stderr)
