"""The request for a tuning: which method, and which of its settings differ from the default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MethodName = Literal[
    "token_mixing",
    "spatial",
    "full",
    "temporal",
    "dual_attention",
    "st_adapter",
    "adapter",
    "bitfit",
    "lora",
    "frozen",
]


@dataclass(frozen=True)
class Tuning:
    """How to tune a pre-trained model. None leaves a setting to the method."""

    method: MethodName = "token_mixing"
    """Tuning method."""
    everything: bool | None = None
    """Update the whole model, text side included: the paper's (F), and the default of "full"."""
    layers: tuple[int, ...] | None = None
    """Layers that the method changes; negative ones count from the end. None: the last for
    token_mixing and spatial, the new blocks for temporal and full, all for the others."""
    mixing: str = "released"
    """Which tokens token_mixing attends to: released, paper, joint, ..."""
    linear_projection: bool | None = None
    """Update the patch embedding, [CLS] and the position embeddings (Table 4, LP)."""
    language_head: bool | None = None
    """Update the heads on top of the text and video features (Table 4, LH)."""
    attention: bool | None = None
    """Update the method's part at the attention of its layers (Table 4)."""
    ffn: bool | None = None
    """Update the method's part at the FFN of its layers (Table 4)."""
    bottleneck: int | None = None
    """Width inside an adapter; None: an eighth of the model's width, half of it for st_adapter."""
    rank: int = 8
    """Rank of a LoRA update."""
    num_blocks: int | None = None
    """Temporal blocks that temporal and full add; None: four, or the tower's depth if less."""
    temporal_position: bool = False
    """Add a learnt frame position below the first temporal attention; not in the paper."""
