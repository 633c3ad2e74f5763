"""The few ratios that README.md shows: a line for each, a column for each machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.rows import Row, read_rows
from bench.targets import FUSED, PEERS, Results, short
from tokenmix_ops.peer_layers import LAYER_TITLES


@dataclass(frozen=True)
class Headline:
    """A ratio: how many times faster a contender is than the fastest of some others.

    ``shape`` is what a GPU's rows call it; a CPU's are of a layer only, and have no such name.
    """

    text: str
    against: str
    shape: str
    of_pass: str
    others: Sequence[str]
    contender: str = "triton"


def _of_layer(text: str, of_pass: str, other: str, contender: str) -> Headline:
    whole = f"whole layer, {text}"
    return Headline(whole, LAYER_TITLES[other], "layer, B = 64", of_pass, [other], contender)


HEADLINES = (
    Headline("operator, forward, gain 0.8", "naive gather", "main", "forward", ["naive_gather"]),
    Headline(
        "operator, forward, gain off", "gather + best fused", "main, gain off", "forward", FUSED
    ),
    Headline(
        "operator, forward + backward, gain 0.8", "best peer", "main", "forward + backward", PEERS
    ),
    _of_layer("forward, gain off", "forward", "spatial_sdpa", "token_mixing_gain_off"),
    _of_layer(
        "forward + backward, gain off",
        "forward + backward",
        "spatial_sdpa",
        "token_mixing_gain_off",
    ),
    _of_layer("forward, gain 0.8", "forward", "naive_gather", "token_mixing"),
)


def headlines_table(results: Path) -> str:
    """The ratios, from the files in a folder of results; those of a GPU beside the card's name."""
    layer, rerank = results / "layer-cpu.jsonl", results / "rerank-cpu.jsonl"
    if not (layer.exists() and rerank.exists()):
        return "Not measured."
    on_cpu = read_rows(layer)
    columns = {"CPU, float32": _cells(on_cpu)}
    machines = [f"CPU: {on_cpu[0]['threads']} threads of {_about(on_cpu)}"]
    for file in sorted(results.glob("gpu-*.jsonl")):
        rows = read_rows(file)
        if any(cells := _cells(rows)):
            columns[f"{rows[0]['hardware']}, bfloat16"] = cells
            machines.append(f"GPU: {_about(rows)}")
    if len(machines) == 1:
        machines.append("None of this has been measured on a GPU yet")
    ranked = next(row for row in read_rows(rerank) if row["contender"] == "for_every_text")
    rest = [""] * (len(columns) - 1)
    lines = [_line("times as fast", "against", *columns), "|---|---|" + "---:|" * len(columns)]
    for number, headline in enumerate(HEADLINES):
        found = [cells[number] for cells in columns.values()]
        if any(found):
            lines.append(_line(headline.text, headline.against, *found))
    ratio = f"{ranked['ratio']:.1f}"
    lines.append(_line("re-ranking videos for a text", "transformers", ratio, *rest))
    where = ". ".join(machines)
    return "\n".join([*lines, "", f"BLIP ViT-B/16, 8 frames at 224 pixels. {where}."])


def _cells(rows: Sequence[Row]) -> list[str]:
    """What a column says of each of `HEADLINES`; nothing where it was not measured."""
    results, cells = Results(rows), []
    of_gpu = any("shape" in row for row in rows)
    for headline in HEADLINES:
        shape = headline.shape if of_gpu else None
        found = results.ratio(shape, headline.of_pass, headline.others, headline.contender)
        who = f" ({short(found.slower)})" if found and len(headline.others) > 1 else ""
        cells.append(f"{found.times:.2f}{who}" if found else "")
    return cells


def _about(rows: Sequence[Row]) -> str:
    row = next(row for row in rows if "rounds_ms" in row)
    named = (row["hardware"], f"{row['batch']} videos", f"PyTorch {row['torch']}", row["date"])
    return ", ".join(named)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
