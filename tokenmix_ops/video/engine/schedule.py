"""The learning rate of every update."""

from __future__ import annotations

from math import cos, pi

from tokenmix_ops.video.engine.hyperparameters import Training


def learning_rate(settings: Training, update: int, per_epoch: int, total: int) -> float:
    """Learning rate of update ``update``, counted from 0, of ``total``.

    "epoch_cosine" is the authors': 0.5 * (1 + cos(pi * epoch / epochs)) of the highest, set once
    per epoch. A warm-up rises linearly; "cosine" falls over the updates after it.
    """
    if update < settings.warmup_steps:
        return settings.learning_rate * (update + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    if settings.schedule == "epoch_cosine":
        done = (update // per_epoch) / settings.epochs
    else:
        done = (update - settings.warmup_steps) / max(total - settings.warmup_steps, 1)
    return settings.learning_rate * 0.5 * (1 + cos(pi * done))
