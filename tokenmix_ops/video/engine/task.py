"""What the engine asks of a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn

from tokenmix_ops.video.engine.progress import Progress


class Task(Protocol):
    """A model, its loss, and how good it is.

    Attributes:
        name: "captioning" or "retrieval".
        model: called as ``model(batch, epoch)`` with a batch on the device and the epochs done so
            far (0.5: the middle of the first); returns scalar mean losses, their total under
            "loss". Only the total may carry a gradient.
    """

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> nn.Module: ...

    def kept(self) -> Iterable[str]:
        """Names of the model's parameters that change without a gradient: momentum copies."""

    def weight(self, batch: Any) -> float:
        """What the mean of a batch's loss is over: target tokens, or pairs. The batch is not yet
        on the device."""

    def after_update(self) -> None:
        """Called after every update of the parameters."""

    def evaluate(
        self, accelerator: Accelerator, split: str, progress: Progress
    ) -> Mapping[str, float | str]:
        """Figures of a split, the one to select by, the larger the better, under "score".

        Texts say how figures came about. All processes call it, and all get the same figures.
        """

    def save_updated(self, path: Path, figures: Mapping[str, Any]) -> None:
        """Writes the checkpoint of what was updated, atomically; the first process calls it."""
