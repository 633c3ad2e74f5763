"""What the tables have in common: lines, numbers and where they were measured."""

from __future__ import annotations

from bench.rows import Row
from bench.targets import Results
from bench.titles import contender_title
from tokenmix_ops.backends.cpu import in_words


def line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def milliseconds(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.3g}"


def videos(number: int) -> str:
    return "1 video" if number == 1 else f"{number} videos"


def machine(row: Row) -> str:
    threads = f", {row['threads']} threads" if "threads" in row else ""
    if "isa" in row:
        threads += f", kernel with {in_words(row['isa'])}"
    if "forced_isa" in row:
        threads += f", all contenders limited to {row['forced_isa'].upper()}"
    return (
        f"{row['hardware']}{threads}, PyTorch {row['torch']}, tokenmix_ops {row['tokenmix_ops']} "
        f"at {row['commit']}, {row['date']}"
    )


def reasons(results: Results) -> list[str]:
    """What did not run, by reason, in which shapes; in which passes, if it ran in others."""
    ran = {(row.get("shape"), row.get("contender")) for row in results.rows if "reason" not in row}
    found: dict[str, dict[str, dict[str, None]]] = {}
    for row in results.rows:
        if "reason" in row:
            names = found.setdefault(row["reason"], {"who": {}, "where": {}})
            which = f", {row['pass']}" if (row.get("shape"), row["contender"]) in ran else ""
            names["who"][contender_title(row["contender"]) + which] = None
            names["where"][row.get("shape") or row.get("part") or row["pass"]] = None
    return [
        f"- Not run: {'; '.join(names['who'])} ({'; '.join(names['where'])}): {why}"
        for why, names in found.items()
    ]
