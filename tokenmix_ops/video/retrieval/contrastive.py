"""The contrastive loss (ITC) with momentum features, queues and soft targets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softmax

EMPTY = -1
"""The id of an empty queue entry; video ids start at 0."""


class Features(NamedTuple):
    """Pairs in the common space.

    ``video`` and ``text`` [n, dim] are unit vectors; ``ids`` int64 [n] identifies the video.
    """

    video: Tensor
    text: Tensor
    ids: Tensor

    def rows(self, index: slice) -> Features:
        return Features(self.video[index], self.text[index], self.ids[index])


class FeatureQueue(nn.Module):
    """A FIFO queue of the latest ``size`` pairs of momentum features.

    The loss ignores empty entries. BLIP starts with random vectors instead: uninformative negatives
    that make the loss random until the queue has filled once. You may enqueue any number of pairs
    at a time; BLIP requires a divisor of the size. No method synchronises with the GPU.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"queue_size must be at least 1, got {size}")
        self.register_buffer("video", torch.zeros(size, dim))
        self.register_buffer("text", torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), EMPTY))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    video: Tensor
    text: Tensor
    ids: Tensor
    position: Tensor

    def behind(self, features: Features) -> Features:
        """Concatenate ``features`` and the queue, including empty entries."""
        return Features(
            torch.cat([features.video, self.video.to(features.video.dtype)]),
            torch.cat([features.text, self.text.to(features.text.dtype)]),
            torch.cat([features.ids, self.ids]),
        )

    @torch.no_grad()
    def enqueue(self, features: Features) -> None:
        size = len(self.ids)
        # Only the last `size` pairs fit.
        latest = features.rows(slice(max(0, len(features.ids) - size), None))
        places = (self.position + torch.arange(len(latest.ids), device=self.ids.device)) % size
        self.video[places] = latest.video.to(self.video.dtype)
        self.text[places] = latest.text.to(self.text.dtype)
        self.ids[places] = latest.ids
        self.position.copy_((self.position + len(latest.ids)) % size)


def contrastive_loss(
    own: Features, followers: Features, columns: Features, temperature: Tensor, alpha: float
) -> Tensor:
    """Return the soft cross-entropy, averaged over ``own`` pairs and both directions.

    ``own`` [n] are the trained model's features, ``followers`` [n] the momentum copy's features of
    the same pairs, and ``columns`` the momentum features to compare with. Targets mix the momentum
    copy's distribution, weighted ``alpha``, with a uniform one over all columns of the same video.
    Source: ALBEF, eq. 6; BLIP. BLIP's published code computes the columns of the same video but
    then uses only the pair itself.
    """
    with torch.autocast(own.video.device.type, enabled=False):
        filled = columns.ids != EMPTY
        same = (own.ids[:, None] == columns.ids).to(own.video.dtype)
        positive = same / same.sum(dim=1, keepdim=True)

        def direction(queries: Tensor, soft_queries: Tensor, keys: Tensor) -> Tensor:
            def logits(rows: Tensor) -> Tensor:
                return (rows @ keys.T / temperature).masked_fill(~filled, -torch.inf)

            with torch.no_grad():
                targets = alpha * softmax(logits(soft_queries), dim=1) + (1 - alpha) * positive
            # Avoid 0 * inf: empty columns have target 0 and infinite loss.
            log_shares = log_softmax(logits(queries), dim=1).masked_fill(~filled, 0)
            return -(targets * log_shares).sum(dim=1).mean()

        to_text = direction(own.video, followers.video, columns.text)
        to_video = direction(own.text, followers.text, columns.video)
        return (to_text + to_video) / 2
