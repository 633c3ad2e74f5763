"""Counts the parameters that each tuning method updates, next to the paper's figures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import torch
from transformers import BlipForConditionalGeneration

from tokenmix_ops.video.blip import blip_config, build_blip
from tokenmix_ops.video.captioning import VideoCaptioner
from tokenmix_ops.video.retrieval.retriever import VideoRetriever
from tokenmix_ops.video.tuning.methods import apply, switches_of
from tokenmix_ops.video.tuning.settings import Tuning

Backbone = Literal["vit-b16", "vit-l16"]
Task = Literal["captioning", "retrieval"]

_TEXT_LAYERS = ("text_decoder.bert.encoder.layer.", "text_encoder.encoder.layer.")
_DUAL = "the text says only the temporal attention is updated; the figure counts whole layers"
_OURS = "not in the paper"
_LEGEND = (
    "Updated parameters, in millions. Counted: as in the paper, the weight matrices of the visual "
    "encoder's layers. Visual, text: all parameters inside and outside the visual encoder, heads "
    "included. MB: size of the float32 checkpoint. –: the paper prints no figure."
)
_HEAD = (
    "| method | counted | paper | off by | visual | text | total | MB |\n"
    "|:---|---:|---:|---:|---:|---:|---:|---:|"
)


@dataclass(frozen=True)
class Setting:
    """A row of the table: a method, or one reading of it.

    ``captioning`` and ``retrieval`` are the paper's figures for ViT-B/16, in millions, from Table 1
    (parts of a layer: Table 4) and Table 2; None where it prints none.
    """

    name: str
    tuning: Tuning
    captioning: float | None = None
    retrieval: float | None = None
    note: str = ""

    def paper(self, task: Task) -> float | None:
        return self.captioning if task == "captioning" else self.retrieval


SETTINGS = (
    Setting(
        "token_mixing (P)",
        Tuning("token_mixing"),
        7.1,
        7.07,
        "exactly 7.078: the paper rounds it to 7.1 and truncates it to 7.07",
    ),
    Setting("token_mixing, attention only", Tuning("token_mixing", ffn=False), 2.4),
    Setting("token_mixing, FFN only", Tuning("token_mixing", attention=False), 4.7),
    Setting("token_mixing (F)", Tuning("token_mixing", everything=True)),
    Setting("spatial (P)", Tuning("spatial")),
    Setting("spatial (F)", Tuning("spatial", everything=True)),
    Setting("full", Tuning("full"), 226.5, 226.51, "includes the text side's layers"),
    Setting("temporal", Tuning("temporal"), 28.3, 28.31),
    Setting("dual_attention, as the text says", Tuning("dual_attention"), 84.9, note=_DUAL),
    Setting(
        "dual_attention, as the figure says", Tuning("dual_attention", ffn=True), 84.9, note=_DUAL
    ),
    Setting("st_adapter", Tuning("st_adapter"), 54.8, note="exactly 54.854, truncated"),
    Setting(
        "adapter, one a layer",
        Tuning("adapter", ffn=False),
        1.9,
        1.88,
        "what the paper counts",
    ),
    Setting(
        "adapter, two a layer",
        Tuning("adapter"),
        1.9,
        1.88,
        "what the published code inserts; the paper counts one",
    ),
    Setting(
        "bitfit",
        Tuning("bitfit"),
        0.3,
        0.26,
        "all biases, including the text side's",
    ),
    Setting("lora", Tuning("lora"), note=_OURS),
    Setting("frozen", Tuning("frozen"), note=_OURS),
)
"""The rows of `count`, in order."""


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
    task: Task
    as_paper: int
    visual: int
    text: int
    total: int
    checkpoint_mb: float
    paper: float | None
    deviation_percent: float | None
    note: str


def count(backbone: Backbone | None = None, task: Task | None = None) -> list[Row]:
    """Return a row for each of `SETTINGS`, for one backbone and task, or for all if None.

    Models are built on the meta device and allocate no weights.
    """
    return [
        _row(setting, model, b, t)
        for b in (get_args(Backbone) if backbone is None else (backbone,))
        for t in (get_args(Task) if task is None else (task,))
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


def _model(backbone: Backbone, task: Task) -> VideoCaptioner | VideoRetriever:
    with torch.device("meta"):
        blip = build_blip(blip_config(backbone, task), task)
        if isinstance(blip, BlipForConditionalGeneration):
            return VideoCaptioner(blip)
        return VideoRetriever(blip)


def _row(
    setting: Setting, model: VideoCaptioner | VideoRetriever, backbone: Backbone, task: Task
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
    as_paper = sum(p.numel() for n, p in updated.items() if _counts(n, p, setting.tuning))
    paper = setting.paper(task) if backbone == "vit-b16" else None
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


def _counts(name: str, parameter: torch.Tensor, tuning: Tuning) -> bool:
    """Whether the paper's figures count an updated parameter."""
    if tuning.method == "bitfit":
        return True
    layers: tuple[str, ...] = ("encoder.vision_model.encoder.layers.",)
    if tuning.method == "full" and switches_of(tuning).everything:
        layers += _TEXT_LAYERS
    return parameter.dim() > 1 and name.startswith(layers)
