"""What models learn, and how fast videos are found, re-ranked and read, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from bench.rows import Row
from bench.tables.layout import videos

WORLD_COLUMNS = {
    "captioning": ("motion", "BLEU-4", "CIDEr"),
    "retrieval": ("order", "R@1", "R@5"),
}
RERANK_TITLES = {
    "once_a_video": "once a video",
    "for_every_text_fused": "again for every text, fused",
    "for_every_text": "again for every text, transformers",
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
    each = "each of " if row["videos"] > 1 else ""
    lines += [
        "",
        f"{row['texts']} texts of {row['length']} tokens matched with {each}"
        f"{videos(row['videos'])} of {row['num_frames']} frames of {row['num_tokens']} tokens, "
        f"{row['num_layers']} layers of width {row['dim']}, {row['dtype']}; median and quartiles "
        f"of {len(row['rounds_ms'])} rounds, contenders in turn; target ≥ 5×. {row['hardware']}, "
        f"PyTorch {row['torch']}, tokenmix_ops {row['tokenmix_ops']} at {row['commit']}, "
        f"{row['date']}.",
    ]
    return "\n".join(lines)


def search_table(rows: Sequence[Row]) -> str:
    """How often what is found is what the query describes, by retriever and ranking."""
    lines = [
        "| retriever | re-ranked | first hit right | one of five right | colour | shape | motion |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        figures = (row[name] for name in ("top_1", "top_5", "colour", "shape", "motion"))
        cells = " | ".join(f"{figure:.1f}" for figure in figures)
        lines.append(f"| {row['checkpoint']} | {row['rerank'] or 'no'} | {cells} |")
    row = rows[0]
    same = all(row["same_index_after_a_kill"] for row in rows)
    lines += [
        "",
        f"{row['clips']} new clips, each of their captions a query, percent; colour, shape and "
        "motion are those of the first hit. A clip drawn at random is right in "
        f"{row['chance_1']:.1f} %, one of five in {row['chance_5']:.1f} %. Indexed in "
        f"{row['index_seconds']:.1f} s; after a kill midway the index was "
        f"{'the same to the last bit' if same else 'NOT the same'}. {row['hardware']}, "
        f"{row['threads']} threads, PyTorch {row['torch']}, tokenmix_ops {row['tokenmix_ops']} at "
        f"{row['commit']}, {row['date']}.",
    ]
    return "\n".join(lines)


def loading_table(rows: Sequence[Row]) -> str:
    """Clips a second by way of reading, the start of workers, and memory over many clips."""
    lines = ["| clips drawn from | workers | clips a second | rounds |", "|---|---:|---:|---:|"]
    for row in (row for row in rows if row["measure"] == "speed"):
        source = "all frames" if row["fps"] is None else f"{row['fps']:g} frames a second"
        kept = {None: "", "cold": ", filling the cache", "warm": ", from the cache"}[row["cache"]]
        low, high = min(row["rounds"]), max(row["rounds"])
        lines.append(
            f"| {source}{kept} | {row['workers']} | {row['clips_per_second']:.1f} | "
            f"{low:.1f}–{high:.1f} |"
        )
    of_memory = [row for row in rows if row["measure"] == "memory"]
    if of_memory:
        marks = list(of_memory[0]["mib"])
        heads = " | ".join(f"after {mark} %" for mark in marks)
        title = f"MiB of all processes over {of_memory[0]['clips']:,} clips"
        lines += [
            "",
            f"| {title} | {heads} | growth | peak |",
            "|---|" + "---:|" * (len(marks) + 2),
        ]
        for row in of_memory:
            figures = [row["mib"][mark] for mark in marks] + [row["growth_mib"], row["peak_mib"]]
            source = "decoded" if row["cache"] is None else "from the cache"
            lines.append(f"| {source} | " + " | ".join(str(round(mib)) for mib in figures) + " |")
    row = rows[0]
    starts = [f"{other['seconds']:.1f} s by {other['start']}" for other in rows if "start" in other]
    lines += [
        "",
        f"{row['num_frames']} random frames at {row['size']} pixels of H.264 files, "
        f"{_files(row)}{f'; for memory {_files(of_memory[0])}' if of_memory else ''}; median of "
        f"{len(row['rounds'])} rounds, ways in turn. Two workers have their first clip after "
        f"{', '.join(starts)}. Memory is the {of_memory[0]['kind'] if of_memory else 'set'}. "
        f"{row['hardware']}, {row['threads']} threads, PyTorch {row['torch']}, PyAV {row['av']}, "
        f"tokenmix_ops {row['tokenmix_ops']} at {row['commit']}, {row['date']}.",
    ]
    return "\n".join(lines)


def _files(row: Row) -> str:
    like = row["videos"]
    return f"{like['width']}×{like['height']}, {like['seconds']:g} s at {like['rate']} a second"
