"""The training engine: one loop for both tasks, one process or many, that can stop and go on.

Names are imported when first used, so that settings can be read without any model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmix_ops.video.engine.hyperparameters import Training
    from tokenmix_ops.video.engine.loop import train
    from tokenmix_ops.video.engine.task import Task

__all__ = ["Task", "Training", "train"]

_HOMES = {"Task": "task", "Training": "hyperparameters", "train": "loop"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
