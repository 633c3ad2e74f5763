"""Which tokens a query attends to: mixings.

A video is ``num_frames`` frames of ``num_tokens`` tokens each; the first ``num_prefix_tokens`` of
every frame are prefix tokens ([CLS], registers), the others its patches in row-major order. Only
this file decides which token of which frame sits in which key slot; all other code reads the plans
that mixings compile to.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tokenmix_ops.plan import Plan, Rows, Table, on_device, tabulate
from tokenmix_ops.torch_internals import constant, guarded, in_trace_or_transform


@dataclass(frozen=True)
class Mixing:
    """A rule that names, for every query, the tokens of the video that it attends to.

    Build one by a factory (`paper`, `released`, `spatial`, `adjacent`, `temporal`, `joint`,
    `from_index`). A mixing is a value: it is hashable and comparable, ``eval(repr(mixing)) ==
    mixing``, and it survives a round trip through JSON. `plan` compiles it for a video layout.
    Source: Token Mixing (AAAI 2023), Eq. 3, 4, 8 and Figure 3.
    """

    kind: str
    cross_frame_gain: float = None  # type: ignore[assignment]
    """Defaults to 0.8 for "released" and to 1.0 for all others."""
    offsets: tuple[int, ...] = ()
    wrap: bool = False
    # Tables of `from_index` as JSON, which torch.compile hashes, compares and guards as one value.
    key_index_json: str = ""
    key_frame_json: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in _RULES:
            raise ValueError(f"unknown mixing kind {self.kind!r}; known: {', '.join(_RULES)}")
        gain = self.cross_frame_gain
        if gain is None:
            gain = 0.8 if self.kind == "released" else 1.0
        object.__setattr__(self, "cross_frame_gain", _as_gain(gain))
        object.__setattr__(self, "offsets", _as_offsets(self.offsets))
        used = {"adjacent": {"offsets", "wrap"}, "from_index": {"key_index", "key_frame"}}
        needed = {"adjacent": "offsets", "from_index": "key_index"}.get(self.kind)
        for field in ("offsets", "wrap", "key_index_json", "key_frame_json"):
            given, name = bool(getattr(self, field)), _name(field)
            if given and name not in used.get(self.kind, ()):
                raise ValueError(f"a {self.kind!r} mixing has no {name}")
            if not given and name == needed:
                raise ValueError(f"{name} must not be empty in a mixing of kind {self.kind!r}")
        if self.kind == "spatial" and self.cross_frame_gain != 1.0:
            raise ValueError("a 'spatial' mixing has no cross_frame_gain: it has no other frames")
        if self.key_index_json:
            _check_tables(self.key_index_json, self.key_frame_json)

    @classmethod
    def paper(cls, *, cross_frame_gain: float = 1.0) -> Mixing:
        """Token s of frame ``s mod num_frames``, for every s; num_tokens keys (paper, Eq. 8)."""
        return cls("paper", cross_frame_gain)

    @classmethod
    def released(cls, *, cross_frame_gain: float = 0.8) -> Mixing:
        """The prefix tokens of all frames, then patch p of frame ``p mod num_frames``.

        The keys of the authors' published implementation; logits of patches from another frame
        than the query's are multiplied by ``cross_frame_gain``. num_frames * num_prefix_tokens
        + (num_tokens - num_prefix_tokens) keys.
        """
        return cls("released", cross_frame_gain)

    @classmethod
    def spatial(cls) -> Mixing:
        """The query's own frame; num_tokens keys. Plain ViT attention (paper, Eq. 3)."""
        return cls("spatial")

    @classmethod
    def adjacent(
        cls,
        offsets: Sequence[int] = (-1, 0, 1),
        *,
        wrap: bool = False,
        cross_frame_gain: float = 1.0,
    ) -> Mixing:
        """Patch p of frame ``t + offsets[p mod len(offsets)]``, and the frame's own prefix tokens.

        Frame numbers past the ends are clamped, or wrap around if ``wrap``. num_tokens keys
        (paper, Figure 3, tokens from adjacent frames).
        """
        return cls("adjacent", cross_frame_gain, offsets=_as_offsets(offsets), wrap=bool(wrap))

    @classmethod
    def temporal(cls, *, cross_frame_gain: float = 1.0) -> Mixing:
        """Token s of all frames for queries at token s; num_frames keys (paper, Eq. 4)."""
        return cls("temporal", cross_frame_gain)

    @classmethod
    def joint(cls, *, cross_frame_gain: float = 1.0) -> Mixing:
        """All num_frames * num_tokens tokens: joint space-time attention."""
        return cls("joint", cross_frame_gain)

    @classmethod
    def from_index(
        cls,
        key_index: Tensor | Sequence[Any],
        key_frame: Tensor | Sequence[Any] | None = None,
        *,
        cross_frame_gain: float = 1.0,
    ) -> Mixing:
        """Any keys: ``key_index`` holds flat indices ``frame * num_tokens + token``.

        Its shape is [num_keys] or [1, num_keys] for one key set shared by all frames, or
        [num_frames, num_keys] for one set per frame. ``key_frame``, of the same shape, holds the
        frame that a key counts as for the gain, or -1 to never scale it; by default this is the
        frame of the index, and -1 for prefix tokens. Raises ValueError for other shapes or no keys.
        """
        frame = "" if key_frame is None else json.dumps(_as_table("key_frame", key_frame))
        index = json.dumps(_as_table("key_index", key_index))
        return cls("from_index", cross_frame_gain, key_index_json=index, key_frame_json=frame)

    @classmethod
    def named(cls, mixing: Mixing | str) -> Mixing:
        """Returns a mixing unchanged, or the one with a name such as ``"released"``."""
        if isinstance(mixing, Mixing):
            return mixing
        if mixing in NAMES:
            return _named(mixing)
        raise ValueError(
            f"mixing must be a Mixing or one of {', '.join(map(repr, NAMES))}, got {mixing!r}"
        )

    def plan(
        self,
        num_frames: int,
        num_tokens: int,
        num_prefix_tokens: int = 1,
        device: torch.device | str | None = None,
    ) -> Plan:
        """Compiles the mixing for a video layout; cached.

        Raises ValueError unless num_frames >= 1 and num_tokens > num_prefix_tokens >= 0, or if an
        index of `from_index` lies outside the video.
        """
        device = torch.device(device if device is not None else "cpu")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        table = _table(self, int(num_frames), int(num_tokens), int(num_prefix_tokens))
        make = on_device.__wrapped__ if in_trace_or_transform() else on_device
        return make(table, device)

    def to_json(self) -> str:
        """Writes the mixing as a JSON object: kind, gain, and the parameters of its kind."""
        values = {_name(f.name): getattr(self, f.name) for f in fields(self)}
        return json.dumps({k: v for k, v in values.items() if v or k == "cross_frame_gain"})

    @classmethod
    def from_json(cls, text: str) -> Mixing:
        """Reads the output of `to_json`; raises ValueError for any other text."""
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a mixing in JSON: {text[:100]}") from error
        if not isinstance(given, dict) or "kind" not in given:
            raise ValueError(f"not a mixing in JSON (an object with 'kind'): {text[:100]}")
        known = {_name(f.name): f.name for f in fields(cls)}
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"a mixing has no {unknown[0]!r}; it has {', '.join(known)}")
        return cls(**{known[name]: value for name, value in given.items()})

    def __repr__(self) -> str:
        given: list[str] = []
        if self.kind == "adjacent":
            given += [repr(self.offsets)] + ["wrap=True"] * self.wrap
        if self.kind == "from_index":
            given += [table for table in (self.key_index_json, self.key_frame_json) if table]
        if self.cross_frame_gain != (0.8 if self.kind == "released" else 1.0):
            given += [f"cross_frame_gain={self.cross_frame_gain!r}"]
        return f"Mixing.{self.kind}({', '.join(given)})"


NAMES = ("paper", "released", "spatial", "adjacent", "temporal", "joint")
"""The mixings that can be given by name, with their default parameters."""


# One object per name, so code compiled for one layer serves every layer with that mixing.
@lru_cache
def _named(name: str) -> Mixing:
    return getattr(Mixing, name)()


def plan_of(
    mixing: Mixing | str,
    num_frames: int,
    num_tokens: int,
    num_prefix_tokens: int,
    device: torch.device,
) -> Plan:
    """Like `Mixing.plan`, for code that torch.compile traces."""
    if not torch.compiler.is_compiling():
        return Mixing.named(mixing).plan(num_frames, num_tokens, num_prefix_tokens, device)
    # By value, because the traced function may itself create the mixing.
    values: tuple[Any, ...] = (mixing,)
    if isinstance(mixing, Mixing):
        values = (
            mixing.kind,
            guarded(mixing.cross_frame_gain),
            tuple([guarded(offset) for offset in mixing.offsets]),
            mixing.wrap,
            mixing.key_index_json,
            mixing.key_frame_json,
        )
    # A plan is for one layout, so sizes that the compiler made symbolic are specialised.
    t, s, p = [guarded(n) for n in (num_frames, num_tokens, num_prefix_tokens)]
    return _constant_plan(values, t, s, p, device)


@constant
def _constant_plan(values: tuple[Any, ...], t: int, s: int, p: int, device: torch.device) -> Plan:
    mixing = Mixing.named(values[0]) if len(values) == 1 else Mixing(*values)
    return mixing.plan(t, s, p, device)


def _paper(m: Mixing, t: int, s: int, p: int) -> tuple[Rows, list[list[int]]]:
    return "shared", [[(token % t) * s + token for token in range(s)]]


def _released(m: Mixing, t: int, s: int, p: int) -> tuple[Rows, list[list[int]]]:
    prefixes = [frame * s + token for frame in range(t) for token in range(p)]
    return "shared", [prefixes + [(patch % t) * s + p + patch for patch in range(s - p)]]


def _spatial(m: Mixing, t: int, s: int, p: int) -> tuple[Rows, list[list[int]]]:
    return "frame", [[frame * s + token for token in range(s)] for frame in range(t)]


def _adjacent(m: Mixing, t: int, s: int, p: int) -> tuple[Rows, list[list[int]]]:
    def source(frame: int, token: int) -> int:
        if token < p:
            return frame
        frame += m.offsets[(token - p) % len(m.offsets)]
        return frame % t if m.wrap else min(max(frame, 0), t - 1)

    return "frame", [[source(frame, k) * s + k for k in range(s)] for frame in range(t)]


def _temporal(m: Mixing, t: int, s: int, p: int) -> tuple[Rows, list[list[int]]]:
    return "token", [[frame * s + token for frame in range(t)] for token in range(s)]


def _joint(m: Mixing, t: int, s: int, p: int) -> tuple[Rows, list[list[int]]]:
    return "shared", [list(range(t * s))]


def _from_index(m: Mixing, t: int, s: int, p: int) -> tuple[Rows, list[list[int]]]:
    index = json.loads(m.key_index_json)
    num_rows = len(index)
    if num_rows not in (1, t):
        raise ValueError(
            f"key_index has {num_rows} rows; it must have one, or num_frames = {t}, one a frame"
        )
    largest = max(max(row) for row in index)
    if largest >= t * s:
        raise ValueError(
            f"key_index names token {largest}, but a video of {t} frames of {s} tokens ends at "
            f"{t * s - 1}"
        )
    return "shared" if num_rows == 1 else "frame", index


_Rule = Callable[[Mixing, int, int, int], tuple[Rows, list[list[int]]]]
_RULES: dict[str, _Rule] = {
    "paper": _paper,
    "released": _released,
    "spatial": _spatial,
    "adjacent": _adjacent,
    "temporal": _temporal,
    "joint": _joint,
    "from_index": _from_index,
}


@lru_cache(maxsize=256)
def _table(mixing: Mixing, t: int, s: int, p: int) -> Table:
    if t < 1:
        raise ValueError(f"num_frames must be at least 1, got {t}")
    if not 0 <= p < s:
        raise ValueError(
            f"num_tokens must exceed num_prefix_tokens, which must not be negative; got "
            f"num_tokens = {s}, num_prefix_tokens = {p}"
        )
    rows, index = _RULES[mixing.kind](mixing, t, s, p)
    frame = json.loads(mixing.key_frame_json) if mixing.key_frame_json else None
    return tabulate(mixing, mixing.cross_frame_gain, t, s, p, rows, index, frame)


def _name(field: str) -> str:
    """The name of a field of `Mixing` in JSON and in errors."""
    return field.removesuffix("_json")


def _as_gain(value: Any) -> float:
    if isinstance(value, bool | str | Tensor):
        raise ValueError(f"cross_frame_gain must be a number, got {value!r}")
    try:
        gain = float(value)
    except TypeError as error:
        raise ValueError(f"cross_frame_gain must be a number, got {value!r}") from error
    if not 0.0 <= gain < float("inf"):
        raise ValueError(f"cross_frame_gain must be finite and not negative, got {value!r}")
    return gain


def _as_offsets(values: Any) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError as error:
        raise ValueError(f"offsets must be a sequence of int, got {values!r}") from error


def _as_table(name: str, values: Any) -> list[list[int]]:
    """Converts ``values`` to a table of integers [num_rows, num_keys], or raises ValueError."""
    wanted = f"{name} must be integers of shape [num_keys] or [num_frames, num_keys]"
    try:
        table = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{wanted}, got {str(values)[:60]}") from error
    if table.numel() == 0 or table.dim() not in (1, 2):
        raise ValueError(f"{wanted}, with at least one key, got shape {list(table.shape)}")
    if table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
        raise ValueError(f"{wanted}, got {table.dtype}")
    rows: list[list[int]] = torch.atleast_2d(table).tolist()
    return rows


def _check_tables(key_index: str, key_frame: str) -> None:
    try:
        index = torch.tensor(json.loads(key_index))
        frame = torch.tensor(json.loads(key_frame)) if key_frame else index
    except (TypeError, ValueError) as error:
        raise ValueError("key_index and key_frame must be tables in JSON") from error
    if index.dim() != 2 or index.is_floating_point():
        raise ValueError("key_index and key_frame must be tables of integers in JSON")
    if frame.shape != index.shape:
        raise ValueError(
            f"key_frame must have the shape of key_index, {list(index.shape)}, got "
            f"{list(frame.shape)}"
        )
    # The minimum of a tensor would be unknown to torch.export.
    if min(map(min, json.loads(key_index))) < 0:
        raise ValueError("key_index must not be negative: frame * num_tokens + token")
