"""The facts of a call that kernels are compiled for, and how they name strides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

ONE_PASS = 256
"""Most keys whose logits a program holds in registers, so that its softmax takes one pass."""


class Strides(NamedTuple):
    """How far apart a tensor's videos, frames, tokens and heads lie; selected keys have no frames.

    Kernels make one of each tensor's four arguments: tuples as arguments would add up to 20 % to
    the time that Triton takes to launch a kernel.
    """

    video: int
    frame: int
    token: int
    head: int


class Constant(dict[str, Any]):
    """Base of dataclasses that kernels take as constants, equal to a dictionary of their fields.

    Triton writes constants as JSON for users' hooks, and JSON knows dictionaries.
    """

    def __post_init__(self) -> None:
        self.update(vars(self))


@dataclass(frozen=True)
class Tile(Constant):
    """A tile of key slots."""

    first: int
    width: int
    ragged: bool
    """Whether the tile extends past the last slot."""


@dataclass(frozen=True)
class Layout(Constant):
    """Everything that a kernel is compiled for except tiles and dtypes; no batch, no strides.

    A group is the set of queries that share a row of keys: those of the video or of one frame.
    """

    num_frames: int
    group_frames: int
    num_queries: int
    num_tokens: int
    num_prefix_tokens: int
    num_heads: int
    head_dim: int
    num_keys: int
    num_full_tokens: int
    """As in a plan; -1 means that kernels read the table."""
    selected: bool
    """Whether key and value are [batch, num_keys, num_heads, head_dim]."""
    gains: bool
    """Whether some logits are multiplied by the gain."""
    precision: str
    """Precision of float32 products: "ieee" or "tf32"."""
    upcast: bool
    """Whether to multiply in float32, because Triton's interpreter cannot in bfloat16."""

    wide: bool
    """Whether offsets within a video need 64 bits. Offsets of videos and heads always use them."""
    alignment: int
    """A power of two, at most 16, that divides the address of every row of head_dim numbers."""
    num_rows: int = field(init=False)
    group_queries: int = field(init=False)
    by_token: bool = field(init=False)
    """Whether key gradients are gathered by token, through the plan's inverse table."""
    num_unselected: int = field(init=False)
    """Number of tokens of a group that the strided rule leaves out."""
    gain_period: int = field(init=False)
    """Frames of a group, if slots past `num_unscaled` name them in turn, so that a frame's largest
    logit is its largest score times its gain; 0 where kernels multiply each score."""
    num_unscaled: int = field(init=False)
    """Number of slots, the first ones, that hold prefix tokens; for a `gain_period`."""

    # Fields, not properties, so they are part of the key of Triton's cache of compiled kernels.
    def __post_init__(self) -> None:
        by_token = self.num_full_tokens < 0 and not self.selected
        unselected = (self.num_tokens - self.num_full_tokens) * (self.group_frames - 1)
        object.__setattr__(self, "num_rows", self.num_frames // self.group_frames)
        object.__setattr__(self, "group_queries", self.group_frames * self.num_queries)
        object.__setattr__(self, "by_token", by_token)
        none_left = self.selected or by_token
        object.__setattr__(self, "num_unselected", 0 if none_left else unselected)
        frames, full = self.group_frames, max(self.num_full_tokens, 0)
        # Tiles are multiples of 16 slots.
        periodic = self.num_full_tokens >= 0 and frames in (2, 4, 8, 16)
        periodic = periodic and self.gains and full <= self.num_prefix_tokens
        object.__setattr__(self, "gain_period", frames if periodic else 0)
        unscaled = frames * full + self.num_prefix_tokens - full
        object.__setattr__(self, "num_unscaled", unscaled)
        super().__post_init__()
