"""Counts the parameters that each tuning method updates, next to the paper's figures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import torch
from transformers import BlipForConditionalGeneration

from tokenmix_ops.video.blip import TaskName, blip_config, build_blip
from tokenmix_ops.video.captioning import VideoCaptioner
from tokenmix_ops.video.retrieval.retriever import VideoRetriever
from tokenmix_ops.video.tuning.method import Setting
from tokenmix_ops.video.tuning.methods import METHODS, apply, switches_of

Backbone = Literal["vit-b16", "vit-l16"]

_LEGEND = (
    "Updated parameters, in millions. Counted: as in the paper, the weight matrices of the visual "
    "encoder's layers. Visual, text: all parameters inside and outside the visual encoder, heads "
    "included. MB: size of the float32 checkpoint. –: the paper prints no figure."
)
_HEAD = (
    "| method | counted | paper | off by | visual | text | total | MB |\n"
    "|:---|---:|---:|---:|---:|---:|---:|---:|"
)


SETTINGS = tuple(setting for method in METHODS.values() for setting in method.settings)
"""What `count` counts, in the order of its rows."""


@dataclass(frozen=True)
class Row:
    """The parameters that one method updates in one model.

    ``as_paper``: weight matrices of the visual encoder's layers, new and old; for "full" also the
    text side's layers, for "bitfit" all biases. ``visual`` and ``text``: all updated parameters
    inside and outside the visual encoder, heads included. ``checkpoint_mb``: size of a float32
    checkpoint in 10^6 bytes. ``paper``: the paper's figure, in millions, and
    ``deviation_percent`` of ``as_paper`` from it; both None where the paper prints none.
    """

    method: str
    backbone: Backbone
    task: TaskName
    as_paper: int
    visual: int
    text: int
    total: int
    checkpoint_mb: float
    paper: float | None
    deviation_percent: float | None
    note: str


def count(backbone: Backbone | None = None, task: TaskName | None = None) -> list[Row]:
    """Return a row for each of `SETTINGS`, for one backbone and task, or for all if None.

    Models are built on the meta device and allocate no weights.
    """
    return [
        _row(setting, model, b, t)
        for b in (get_args(Backbone) if backbone is None else (backbone,))
        for t in (get_args(TaskName) if task is None else (task,))
        for model in [_model(b, t)]
        for setting in SETTINGS
    ]


def table(rows: Sequence[Row]) -> str:
    """Render the rows as Markdown: a table with notes for each backbone and task."""
    parts = [_LEGEND]
    for (backbone, task), group in groupby(rows, key=lambda row: (row.backbone, row.task)):
        lines = list(group)
        notes = [f"- {row.method}: {row.note}" for row in lines if row.note]
        parts += [f"### {backbone}, {task}", "\n".join([_HEAD, *map(_line, lines)])]
        parts += ["\n".join(notes)] if notes else []
    return "\n\n".join(parts)


def _line(row: Row) -> str:
    paper = "–" if row.paper is None else f"{row.paper:g}"
    off = row.deviation_percent
    # Adding zero turns a rounded -0.0 into 0.0.
    deviation = "–" if off is None else f"{round(off, 1) + 0.0:+.1f} %"
    millions = [f"{n / 1e6:.3f}" for n in (row.as_paper, row.visual, row.text, row.total)]
    counted, *honest = millions
    cells = [row.method, counted, paper, deviation, *honest, f"{row.checkpoint_mb:.1f}"]
    return f"| {' | '.join(cells)} |"


def _model(backbone: Backbone, task: TaskName) -> VideoCaptioner | VideoRetriever:
    with torch.device("meta"):
        blip = build_blip(blip_config(backbone, task), task)
        if isinstance(blip, BlipForConditionalGeneration):
            return VideoCaptioner(blip)
        return VideoRetriever(blip)


def _row(
    setting: Setting, model: VideoCaptioner | VideoRetriever, backbone: Backbone, task: TaskName
) -> Row:
    # Copy only the encoder's modules, which apply() changes; share everything else.
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    shared = [*tensors, *(part for part in model.children() if part is not model.encoder)]
    model = copy.deepcopy(model, {id(part): part for part in shared})
    with torch.device("meta"):
        apply(model, setting.tuning)
    updated = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in updated.values())
    visual = sum(p.numel() for name, p in updated.items() if name.startswith("encoder."))
    method, switches = METHODS[setting.tuning.method], switches_of(setting.tuning)
    as_paper = sum(p.numel() for n, p in updated.items() if method.counts(n, p, switches))
    printed = setting.captioning if task == "captioning" else setting.retrieval
    paper = printed if backbone == "vit-b16" else None
    return Row(
        method=setting.name,
        backbone=backbone,
        task=task,
        as_paper=as_paper,
        visual=visual,
        text=total - visual,
        total=total,
        checkpoint_mb=total * 4 / 1e6,
        paper=paper,
        deviation_percent=None if paper is None else (as_paper / paper / 1e6 - 1) * 100,
        # A note about the paper's figure makes no sense without the figure.
        note="" if paper is None and setting.captioning is not None else setting.note,
    )
