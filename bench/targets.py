"""Ratios of a run's rows, and what they have to reach on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.rows import Row, latest
from bench.titles import short
from tokenmix_ops.peers import KERNELS, SDPA, SDPA_BY_FRAME
from tokenmix_ops.timing import ratio

FUSED = (*SDPA, *SDPA_BY_FRAME, "xformers", "flash_attn")
OTHERS = {
    "eager": ("eager",),
    "naive gather": ("naive_gather",),
    "gather + best fused": FUSED,
    "gather + FlexAttention": ("flex",),
    "no mixing, SDPA": ("spatial_sdpa",),
}
"""What our kernels are compared with: under each name, the fastest of these contenders."""
PEERS = ("naive_gather", *FUSED, "flex")


@dataclass(frozen=True)
class Ratio:
    """How many times faster one contender is than the fastest of some others: median and quartiles
    of the pairs in each round."""

    times: float
    low: float
    high: float
    slower: str

    def __str__(self) -> str:
        return f"{self.times:.2f}×"


class Results:
    """Rows of one machine by what they are about, of each race the latest; ``ours`` is the backend
    with kernels that took part.

    Raises ValueError for rows of several: no ratio may compare two of them.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        machines = list(dict.fromkeys(str(row["hardware"]) for row in rows))
        if len(machines) > 1:
            raise ValueError(f"expected rows of one machine, got {' and '.join(machines)}")
        self.rows, self.hardware = latest(rows), "".join(machines)
        there = {row.get("contender") for row in rows}
        self.ours = next((name for name in KERNELS.values() if name in there), "eager")

    def find(self, shape: str | None, of_pass: str, contender: str) -> Row | None:
        """The timed row; None if there is none."""
        for row in self.rows:
            about = (row.get("shape"), row.get("pass"), row.get("contender"))
            if about == (shape, of_pass, contender) and "median_ms" in row:
                return row
        return None

    def ratio(
        self,
        shape: str | None,
        of_pass: str,
        others: Sequence[str],
        contender: str | None = None,
    ) -> Ratio | None:
        """Of the contender, `ours` if None; None unless it and any of the others were timed."""
        faster = self.find(shape, of_pass, contender or self.ours)
        found = [row for name in others if (row := self.find(shape, of_pass, name))]
        if not faster or not found:
            return None
        slower = min(found, key=lambda row: row["median_ms"])
        timings = {"slower": slower["rounds_ms"], "faster": faster["rounds_ms"]}
        return Ratio(*ratio(timings, "slower", "faster"), slower["contender"])

    def fraction(self, shape: str, of_pass: str) -> float | None:
        """Of the floor: 1 if the kernels take no longer than they must."""
        row = self.find(shape, of_pass, self.ours)
        return row["floor_ms"] / row["median_ms"] if row else None

    def part(self, name: str) -> list[Row]:
        return [row for row in self.rows if row["part"] == name]


Verdict = tuple[str, bool]
"""What was measured, and whether that is enough."""


@dataclass(frozen=True)
class Target:
    """A line of the table of targets."""

    text: str
    wanted: str
    judge: Callable[[Results], Verdict | None]


def faster(
    text: str,
    shape: str | None,
    of_pass: str,
    others: Sequence[str],
    at_least: float,
    contender: str | None = None,
) -> Target:
    """How many times faster the contender, or `Results.ours`, has to be than the fastest of some
    others."""

    def judge(results: Results) -> Verdict | None:
        found = results.ratio(shape, of_pass, others, contender)
        if found is None:
            return None
        against = f", {short(found.slower)}" if len(others) > 1 else ""
        return f"{found} ({found.low:.2f}–{found.high:.2f}{against})", found.times >= at_least

    return Target(text, f"≥ {at_least:g}×", judge)


def _of_floor(text: str, of_pass: str, at_least: float) -> Target:
    def judge(results: Results) -> Verdict | None:
        found = results.fraction("main", of_pass)
        return None if found is None else (f"{found:.0%}", found >= at_least)

    return Target(text, f"≥ {at_least:.0%}", judge)


def _memory(of_pass: str) -> Target:
    def judge(results: Results) -> Verdict | None:
        row = results.find("main", of_pass, results.ours)
        if row is None or "extra_mb" not in row:
            return None
        queries = row["batch"] * row["num_frames"] * row["num_tokens"] * row["num_heads"]
        # The allocator may hand out blocks that are larger than what was asked for by 1 MiB each.
        return f"{row['extra_mb']:.1f} MB", row["extra_mb"] <= 4 * queries / 1e6 + 2.1

    text = f"memory of a {of_pass} pass beyond inputs and results"
    return Target(text, "a float32 for each query", judge)


def _deterministic(results: Results) -> Verdict | None:
    row = results.find("main", "backward", results.ours)
    if row is None:
        return None
    same = row["deterministic"]
    return "the same bits twice" if same else "other bits the second time", same


def _host(results: Results) -> Verdict | None:
    for row in results.part("host"):
        if (row["contender"], row["pass"]) == (results.ours, "no autograd") and "median_us" in row:
            return f"{row['median_us']:.1f} µs", row["median_us"] <= 15
    return None


TARGETS = (
    faster("forward against the naive gather", "main", "forward", ["naive_gather"], 15),
    faster(
        "forward against gather + the best SDPA backend, gain off",
        "main, gain off",
        "forward",
        list(SDPA),
        1.5,
    ),
    faster("forward against gather + FlexAttention", "main", "forward", ["flex"], 1.5),
    faster(
        "forward against gather + scaled keys + the best SDPA backend",
        "main",
        "forward",
        [*SDPA, *SDPA_BY_FRAME],
        1.5,
    ),
    faster("forward + backward against the best peer", "main", "forward + backward", PEERS, 1.4),
    faster(
        "forward + backward against the best peer, gain off",
        "main, gain off",
        "forward + backward",
        PEERS,
        1.4,
    ),
    _of_floor("forward, fraction of the floor", "forward", 0.6),
    _of_floor("backward, fraction of the floor", "backward", 0.5),
    faster(
        "S = 577, gain off: forward against cuDNN SDPA on keys already selected",
        "S = 577, gain off",
        "forward",
        ["cudnn_selected"],
        1,
    ),
    faster(
        "adjacent: forward against gather + the best SDPA backend",
        "adjacent",
        "forward",
        list(SDPA),
        2,
    ),
    faster(
        "whole layer: forward + backward against plain spatial attention with SDPA",
        "layer, B = 64",
        "forward + backward",
        ["spatial_sdpa"],
        1.5,
        "token_mixing",
    ),
    _memory("forward"),
    _memory("backward"),
    Target("backward, twice over the same inputs", "the same bits", _deterministic),
    Target("host, one call without autograd", "≤ 15 µs", _host),
)
"""What has to be reached on one GPU, set for an H200 and judged on whichever was measured; shapes
without a word are the main one, with the gain."""


def order(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Shapes and passes, as they were measured."""
    return list(dict.fromkeys((row["shape"], row["pass"]) for row in rows))
