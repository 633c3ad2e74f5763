"""Settings of the training loop, the same for every task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Training:
    """Settings of the training loop; ValueError for numbers out of range."""

    epochs: int = 5
    """Passes over the training set."""
    batch_size: int = 16
    """Clips per batch and process."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Weight decay of AdamW, for all parameters."""
    schedule: Literal["epoch_cosine", "cosine", "constant"] = "epoch_cosine"
    """How the learning rate decays: along a cosine to 0, updated per epoch as the authors do
    (epoch_cosine) or per step (cosine), or not at all (constant)."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    accumulation: int = 1
    """Batches per process whose gradients are accumulated for one step."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; "no" computes in the type of the weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    max_grad_norm: float | None = None
    """Clip gradients to this norm."""
    seed: int = 0
    """Seed for batches, frames and dropout."""
    workers: int = 2
    """Data loader workers per process; 0 reads videos in the training process."""
    save_every: int = 0
    """Steps between saved training states; 0 saves only at the end of each epoch."""
    evaluate_every: int = 1
    """Epochs between evaluations."""
    fsdp: bool = False
    """Shard parameters, gradients and optimiser state over the processes."""
    max_steps: int | None = None
    """Stop after this many steps, to try things out."""

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("accumulation", 1),
            ("evaluate_every", 1),
            ("warmup_steps", 0),
            ("workers", 0),
            ("save_every", 0),
            ("weight_decay", 0),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least {least}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, it must be above 0")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}, it must be above 0")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}, it must be at least 1")
