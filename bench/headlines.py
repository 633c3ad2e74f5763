"""The few ratios that README.md shows: a line for each, a column for each machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.rows import Row, read_rows
from bench.targets import FUSED, PEERS, Results
from bench.titles import short
from tokenmix_ops.peer_layers import LAYER_TITLES


@dataclass(frozen=True)
class Headline:
    """A ratio: how many times faster a contender, or our kernels, are than the fastest of some
    others.

    ``shape`` is what the rows of an operator call it; None of a layer, whose rows have `LAYER` on a
    GPU and no shape on a CPU.
    """

    text: str
    against: str
    shape: str | None
    of_pass: str
    others: Sequence[str]
    contender: str | None = None


LAYER = "layer, B = 64"


def _of_layer(text: str, of_pass: str, other: str, contender: str) -> Headline:
    return Headline(f"whole layer, {text}", LAYER_TITLES[other], None, of_pass, [other], contender)


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
    operator = results / "operator-cpu.jsonl"
    on_cpu = [read_rows(file) for file in (operator, layer) if file.exists()]
    columns = {"CPU, float32": _cells(on_cpu, None)}
    abouts = dict.fromkeys(_about(rows) for rows in on_cpu)
    machines = [f"CPU: {on_cpu[0][0]['threads']} threads of {'; '.join(abouts)}"]
    for file in sorted(results.glob("gpu-*.jsonl")):
        rows = read_rows(file)
        if any(cells := _cells([rows], LAYER)):
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


def _cells(files: Sequence[Sequence[Row]], layer: str | None) -> list[str]:
    """What a column says of each of `HEADLINES`, from files that each are of one machine; nothing
    where it was not measured. ``layer`` is the shape of layers there."""
    results, cells = [Results(rows) for rows in files], []
    for headline in HEADLINES:
        about = headline.shape or layer, headline.of_pass, headline.others, headline.contender
        found = next((ratio for one in results if (ratio := one.ratio(*about))), None)
        who = f" ({short(found.slower)})" if found and len(headline.others) > 1 else ""
        cells.append(f"{found.times:.2f}{who}" if found else "")
    return cells


def _about(rows: Sequence[Row]) -> str:
    row = next(row for row in rows if "rounds_ms" in row)
    named = (row["hardware"], f"{row['batch']} videos", f"PyTorch {row['torch']}", row["date"])
    return ", ".join(named)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
