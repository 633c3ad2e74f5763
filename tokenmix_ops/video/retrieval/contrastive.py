"""The contrastive loss (ITC) with momentum features, queues and soft targets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softmax

EMPTY = -1
"""The video of a queue's entry that has not been filled; videos are numbered from 0."""


class Features(NamedTuple):
    """Pairs in the common space.

    ``video`` and ``text`` [n, dim] are unit vectors, ``ids`` int64 [n] tells whose video it is.
    """

    video: Tensor
    text: Tensor
    ids: Tensor

    def rows(self, index: slice) -> Features:
        return Features(self.video[index], self.text[index], self.ids[index])


class FeatureQueue(nn.Module):
    """The latest ``size`` pairs of momentum features, the oldest replaced first.

    Entries that have not been filled yet take no part in the loss. BLIP starts with random vectors
    instead, negatives that tell the model nothing, make the loss depend on chance and stay for as
    many updates as the queue is long. Any number of pairs may be put in at a time; BLIP wants a
    divisor of the size. Nothing here waits for a GPU.
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
        """``features`` and then the queue's, empty entries too."""
        return Features(
            torch.cat([features.video, self.video.to(features.video.dtype)]),
            torch.cat([features.text, self.text.to(features.text.dtype)]),
            torch.cat([features.ids, self.ids]),
        )

    @torch.no_grad()
    def enqueue(self, features: Features) -> None:
        size = len(self.ids)
        # Of more than it can hold, only the last would stay.
        latest = features.rows(slice(max(0, len(features.ids) - size), None))
        places = (self.position + torch.arange(len(latest.ids), device=self.ids.device)) % size
        self.video[places] = latest.video.to(self.video.dtype)
        self.text[places] = latest.text.to(self.text.dtype)
        self.ids[places] = latest.ids
        self.position.copy_((self.position + len(latest.ids)) % size)


def contrastive_loss(
    own: Features, followers: Features, columns: Features, temperature: Tensor, alpha: float
) -> Tensor:
    """The mean over ``own`` pairs, and over both directions, of the soft cross-entropy.

    ``own`` [n] are the trained model's features and ``followers`` [n] the momentum copy's of the
    same pairs; ``columns`` the momentum features that they are compared with. Targets are
    ``alpha`` of what the momentum copy sees and the rest shared evenly by all columns of the same
    video. Source: ALBEF, eq. 6; BLIP. BLIP's published code works out the columns of the same
    video and then takes the pair itself alone.
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
            # An empty column's infinite loss would meet its target 0.
            log_shares = log_softmax(logits(queries), dim=1).masked_fill(~filled, 0)
            return -(targets * log_shares).sum(dim=1).mean()

        to_text = direction(own.video, followers.video, columns.text)
        to_video = direction(own.text, followers.text, columns.video)
        return (to_text + to_video) / 2
