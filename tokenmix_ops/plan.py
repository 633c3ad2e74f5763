"""Plans: tables of key slots on a device, and facts precomputed from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

Rows = Literal["shared", "frame", "token"]
"""What a row of key slots serves: the whole video, one query frame, or one query token."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A mixing compiled for one video layout: which token sits in each key slot.

    ``key_index`` int32 [num_rows, num_keys] holds flat token indices ``frame * num_tokens +
    token``; ``key_frame`` int32 of the same shape the frame a key comes from, -1 for one whose
    logit is never scaled. The row of query (t, s) is 0, t or s as ``rows`` is "shared", "frame"
    or "token". Logits of keys from another frame than t are multiplied by ``cross_frame_gain``.
    """

    mixing: Any
    """The `Mixing` from which the plan was compiled."""
    num_frames: int
    num_tokens: int
    num_prefix_tokens: int
    num_keys: int
    rows: Rows
    key_index: Tensor
    key_frame: Tensor
    cross_frame_gain: float
    scales_logits: bool
    """Whether the gain changes the logit of any query and key."""
    own_tokens: bool
    """Whether every row lists the tokens of its own group (video, frame or token), in order."""
    num_full_tokens: int | None
    """n if the keys follow the strided rule, which makes the tables redundant: the first n tokens
    of every frame of the row's group, frame by frame, then each later token n + i of frame
    i mod (frames of the group). None if they do not."""
    is_cross_frame: Tensor
    """bool, True where the gain applies: [num_frames, num_keys], indexed by query frame and slot;
    if ``rows`` is "token", [num_tokens, num_frames, num_keys], indexed by query token first."""
    token_order: Tensor
    """int32 [num_frames * num_tokens]: all tokens, ordered so that those used by the same rows are
    adjacent and unused ones come last. Empty, like the next two, if no gradient needs the table."""
    use_start: Tensor
    """int32 [num_frames * num_tokens + 1]: start and end of each token's part of ``uses``."""
    uses: Tensor
    """int32 [num_rows * num_keys]: flat slots ``row * num_keys + slot``, sorted by token, then by
    slot: the inverse of ``key_index``."""


@dataclass(frozen=True, eq=False)
class Table:
    """A plan without a device."""

    key_index: list[list[int]]
    key_frame: list[list[int]]
    facts: dict[str, Any]


def tabulate(
    mixing: Any,
    cross_frame_gain: float,
    t: int,
    s: int,
    p: int,
    rows: Rows,
    index: list[list[int]],
    frame: list[list[int]] | None,
) -> Table:
    """Tabulates a mixing's keys for t frames of s tokens, of which the first p are prefix tokens.

    Without ``frame``, a key counts as its own frame and a prefix token as -1. Raises ValueError if
    ``frame`` names a frame outside the video.
    """
    if frame is None:
        frame = [[-1 if key % s < p else key // s for key in row] for row in index]
    if not all(-1 <= f < t for row in frame for f in row):
        raise ValueError(f"key_frame must lie in -1..{t - 1} for a video of {t} frames")
    query_frames = [{r} if rows == "frame" else set(range(t)) for r in range(len(index))]
    meets_other_frame = any(
        query_frames[r] - {f} for r, row in enumerate(frame) for f in set(row) - {-1}
    )
    facts = dict(
        mixing=mixing,
        num_frames=t,
        num_tokens=s,
        num_prefix_tokens=p,
        num_keys=len(index[0]),
        rows=rows,
        cross_frame_gain=cross_frame_gain,
        scales_logits=cross_frame_gain != 1.0 and meets_other_frame,
        own_tokens=index == _own_tokens(rows, t, s),
        num_full_tokens=_num_full_tokens(index, frame, rows, t, s, p),
    )
    return Table(index, frame, facts)


def _own_tokens(rows: Rows, t: int, s: int) -> list[list[int]]:
    if rows == "shared":
        return [list(range(t * s))]
    if rows == "frame":
        return [[frame * s + token for token in range(s)] for frame in range(t)]
    return [[frame * s + token for frame in range(t)] for token in range(s)]


def _num_full_tokens(
    index: list[list[int]], frame: list[list[int]], rows: Rows, t: int, s: int, p: int
) -> int | None:
    """`Plan.num_full_tokens` of the tables. Their sizes leave one candidate, compared here."""
    group = t if rows == "shared" else 1
    full, remainder = divmod(len(index[0]) - s, max(group - 1, 1))
    if rows == "token" or remainder or not 0 <= full <= s or (group == 1 and full):
        return None
    keys = [(f, k) for f in range(group) for k in range(full)]
    keys += [((k - full) % group, k) for k in range(full, s)]
    for row, (indices, frames) in enumerate(zip(index, frame, strict=True)):
        first = 0 if rows == "shared" else row
        if indices != [(first + f) * s + k for f, k in keys]:
            return None
        if frames != [-1 if k < p else first + f for f, k in keys]:
            return None
    return full


def _inverse(table: Table) -> tuple[list[int], list[int], list[int]]:
    """`Plan.token_order`, `Plan.use_start` and `Plan.uses` of a table."""
    num_keys = table.facts["num_keys"]
    slots: list[list[int]] = [
        [] for _ in range(table.facts["num_frames"] * table.facts["num_tokens"])
    ]
    for row, keys in enumerate(table.key_index):
        for slot, token in enumerate(keys):
            slots[token].append(row * num_keys + slot)
    users = [[slot // num_keys for slot in of_token] for of_token in slots]
    order = sorted(range(len(slots)), key=lambda token: (not users[token], users[token], token))
    start = [0, *accumulate(map(len, slots))]
    return order, start, [slot for of_token in slots for slot in of_token]


@lru_cache(maxsize=256)
def on_device(table: Table, device: torch.device) -> Plan:
    """Builds the plan of a table with its tensors on a device."""
    # Tensors created in inference mode could not be saved for a later backward.
    # Copies from the host are synchronous, so any stream may use the result.
    with torch.inference_mode(False):
        key_index = torch.tensor(table.key_index, dtype=torch.int32)
        key_frame = torch.tensor(table.key_frame, dtype=torch.int32)
        query_frame = torch.arange(table.facts["num_frames"]).unsqueeze(-1)
        of_key = key_frame.unsqueeze(1) if table.facts["rows"] == "token" else key_frame
        is_cross_frame = (of_key != query_frame) & (of_key != -1)
        strided = table.facts["num_full_tokens"] is not None
        inverse = ([], [], []) if strided or table.facts["rows"] == "token" else _inverse(table)
        tables = (torch.tensor(part, dtype=torch.int32) for part in inverse)
        key_index, key_frame, is_cross_frame, token_order, use_start, uses = (
            part.to(device) for part in (key_index, key_frame, is_cross_frame, *tables)
        )
    return Plan(
        key_index=key_index,
        key_frame=key_frame,
        is_cross_frame=is_cross_frame,
        token_order=token_order,
        use_start=use_start,
        uses=uses,
        **table.facts,
    )
