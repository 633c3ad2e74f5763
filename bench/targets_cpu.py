"""What has to be reached on a CPU, and whether the result files of one kind reach it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.targets import OTHERS, Results, Target, Verdict, faster

EAGER_WAYS = ("eager", "naive_gather", "sdpa_flash", "sdpa_flash_by_frame")
SDPA_WAYS = ("eager", "sdpa_flash")
"""Gathered keys, then SDPA, with no gain; the eager backend's gather is another one."""
BOTH = "forward + backward"


@dataclass(frozen=True)
class CpuTarget:
    """A line of the table, judged by the rows of one suite."""

    suite: str
    target: Target

    def judge(self, results: Mapping[str, Results]) -> Verdict | None:
        found = results.get(self.suite)
        return self.target.judge(found) if found else None


def _of_product(text: str, shape: str, at_least: float) -> Target:
    def judge(results: Results) -> Verdict | None:
        found = results.ratio(shape, "forward", ["product"])
        if found is None:
            return None
        shown = f"{found.times:.0%} ({found.low:.0%}–{found.high:.0%})"
        return shown, found.times >= at_least

    return Target(text, f"≥ {at_least:.0%}", judge)


_OPERATOR = (
    _of_product("forward, S = 197: of the rate of a matrix product", "main", 0.95),
    _of_product("forward, S = 577: of the rate of a matrix product", "S = 577", 1.0),
    faster(
        "forward, gain off, S = 197: against gather + SDPA",
        "main, gain off",
        "forward",
        SDPA_WAYS,
        1.3,
    ),
    faster(
        "forward, gain off, S = 577: against gather + SDPA",
        "S = 577, gain off",
        "forward",
        SDPA_WAYS,
        1.15,
    ),
    faster("forward, S = 197: against the fastest eager way", "main", "forward", EAGER_WAYS, 1.6),
    faster(
        "forward, S = 577: against the fastest eager way", "S = 577", "forward", EAGER_WAYS, 1.3
    ),
    faster(
        "forward, S = 197: against FlexAttention",
        "main",
        "forward",
        OTHERS["gather + FlexAttention"],
        1.0,
    ),
    faster(
        "forward + backward, gain off, S = 197: against gather + SDPA",
        "main, gain off",
        BOTH,
        SDPA_WAYS,
        1.45,
    ),
    faster(
        "forward + backward, S = 197: against the fastest eager way", "main", BOTH, EAGER_WAYS, 2.2
    ),
    faster(
        "bfloat16, gain off: forward against gather + SDPA",
        "bfloat16, gain off",
        "forward",
        SDPA_WAYS,
        1.5,
    ),
    faster(
        "bfloat16: forward against the fastest eager way", "bfloat16", "forward", EAGER_WAYS, 1.5
    ),
)
_LAYER = tuple(
    faster(f"layer, {of_pass}: against {who}", None, of_pass, [other], at_least, "token_mixing")
    for of_pass, wanted in (("forward", (1.6, 2.0, 2.4)), (BOTH, (1.5, 1.8, 1.6)))
    for who, other, at_least in zip(
        ("plain SDPA", "BLIP's own", "the naive gather"),
        ("spatial_sdpa", "blip", "naive_gather"),
        wanted,
        strict=True,
    )
)
_TOWER = tuple(
    faster(
        f"BLIP's tower, {batch} × 8 frames, inference: converted against transformers' own",
        f"B = {batch}",
        "forward",
        ["transformers"],
        1.25,
        "converted",
    )
    for batch in (1, 2)
)
CPU_TARGETS = tuple(
    CpuTarget(suite, target)
    for suite, targets in (("operator", _OPERATOR), ("layer", _LAYER), ("tower", _TOWER))
    for target in targets
)
"""Set for two cores and float32, with a gain of 0.8, unless the text says otherwise."""
