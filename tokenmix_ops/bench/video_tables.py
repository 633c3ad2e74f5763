"""The tables of the video stack: tuning methods on the small world, and re-ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

WORLD_COLUMNS = {
    "captioning": ("motion", "BLEU-4", "CIDEr"),
    "retrieval": ("order", "R@1", "R@5"),
}
RERANK_TITLES = {
    "once_a_video": "once a video",
    "for_every_text_fused": "anew for every text, otherwise alike",
    "for_every_text": "anew for every text, transformers",
}


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
    lines += [
        "",
        f"{row['texts']} texts of {row['length']} tokens matched with each of {row['videos']} "
        f"videos of {row['num_frames']} frames of {row['num_tokens']} tokens, "
        f"{row['num_layers']} layers of width {row['dim']}, {row['dtype']}; median and quartiles "
        f"of {len(row['rounds_ms'])} rounds, contenders in turn; target ≥ 5×. {row['hardware']}, "
        f"PyTorch {row['torch']}, tokenmix_ops {row['tokenmix_ops']} at {row['commit']}, "
        f"{row['date']}.",
    ]
    return "\n".join(lines)
