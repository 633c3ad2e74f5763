"""The training engine: one loop for both tasks, one process or many, that can stop and go on."""

from tokenmix_ops.video.engine.settings import Training
from tokenmix_ops.video.engine.task import Task
from tokenmix_ops.video.engine.training import train

__all__ = ["Task", "Training", "train"]
