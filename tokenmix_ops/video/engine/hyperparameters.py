"""How to train: every setting that is not the task's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Training:
    """Settings of the training loop; ValueError for numbers out of range."""

    epochs: int = 5
    """How often to go through the training set."""
    batch_size: int = 16
    """Clips in a batch of each process."""
    learning_rate: float = 1e-5
    """Highest learning rate of AdamW."""
    weight_decay: float = 0.05
    """Weight decay of AdamW, of all parameters."""
    schedule: Literal["epoch_cosine", "cosine", "constant"] = "epoch_cosine"
    """How the learning rate falls: to 0 along a cosine, set anew at each epoch as the authors do
    (epoch_cosine) or at each update (cosine); or not at all."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly at first."""
    accumulation: int = 1
    """Batches of each process whose gradients make one update."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Type of mixed precision; "no" computes in the weights' own."""
    gradient_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass, instead of keeping them."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm."""
    seed: int = 0
    """Seed of the batches, the frames and the dropout."""
    workers: int = 2
    """Processes that read videos, for each process that trains; 0 reads in the same one."""
    save_every: int = 0
    """Updates between two saved training states; 0 saves at the end of each epoch only."""
    evaluate_every: int = 1
    """Epochs between two evaluations."""
    fsdp: bool = False
    """Divide parameters, gradients and the optimiser's state among the processes."""
    max_steps: int | None = None
    """Stop after this many updates, to try things out."""

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
