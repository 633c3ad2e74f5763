"""The facts of a call that kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """All that a kernel is compiled for but its tiles and dtypes; not the batch, not the strides.

    A group is the queries that share one row of keys: of the whole video or of one frame.
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
    """As in a plan; -1: read the table."""
    selected: bool
    """Key and value are [batch, num_keys, num_heads, head_dim]."""
    gains: bool
    """Some logits are multiplied by the gain."""
    precision: str
    """Of float32 products: "ieee" or "tf32"."""
    upcast: bool
    """Products in float32: Triton's interpreter has none in bfloat16."""

    wide: bool
    """Offsets within a video need 64 bits. Between videos and heads they always have them."""
    num_rows: int = field(init=False)
    group_queries: int = field(init=False)
    by_token: bool = field(init=False)
    """The gradient of a key is gathered by token, through the plan's inverse table."""
    num_unselected: int = field(init=False)
    """Tokens of a group that the strided rule leaves out."""

    # Fields, not properties: they belong to the value by which Triton keeps compiled kernels.
    def __post_init__(self) -> None:
        by_token = self.num_full_tokens < 0 and not self.selected
        unselected = (self.num_tokens - self.num_full_tokens) * (self.group_frames - 1)
        object.__setattr__(self, "num_rows", self.num_frames // self.group_frames)
        object.__setattr__(self, "group_queries", self.group_frames * self.num_queries)
        object.__setattr__(self, "by_token", by_token)
        none_left = self.selected or by_token
        object.__setattr__(self, "num_unselected", 0 if none_left else unselected)
