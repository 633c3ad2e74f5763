"""The matching loss (ITM) and the hard negatives that it needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tokenmix_ops.video.retrieval.contrastive import Features

IGNORED = -100


class Negatives(NamedTuple):
    """For each pair of a batch, int64 [n]: a text and a video of the batch of other videos' pairs.

    ``exist`` is whether there are any: a scalar, false where all pairs are of one video.
    """

    texts: Tensor
    videos: Tensor
    exist: Tensor


@torch.no_grad()
def draw_negatives(
    features: Features, temperature: Tensor, generator: torch.Generator
) -> Negatives:
    """Draws negatives, the likelier the more similar: softmax of similarity over temperature.

    Never one of the same video. ``features`` are of the global batch and ``generator`` is one of
    the CPU in the same state on all processes, so that all draw alike. Source: ALBEF; BLIP.
    """
    with torch.autocast(features.video.device.type, enabled=False):
        count = len(features.ids)
        # The largest of logits with Gumbel noise is a draw from their softmax, which itself may
        # underflow to nothing but zeros at a low temperature.
        noise = -torch.empty(2, count, count).exponential_(generator=generator).log()
        noise = noise.to(features.video.device, features.video.dtype)
        similarity = features.video @ features.text.T
        same = features.ids[:, None] == features.ids
        logits = torch.stack([similarity, similarity.T]) / temperature + noise
        texts, videos = logits.masked_fill(same, -torch.inf).argmax(dim=2)
        return Negatives(texts, videos, ~same.all())


def matching_loss(positives: Tensor, negatives: Tensor, exist: Tensor) -> Tensor:
    """Mean cross-entropy of logits [n, 2] of positive and [2 * n, 2] of negative pairs.

    Negatives that do not exist (`Negatives.exist`) do not count.
    """
    label = torch.where(exist, 0, IGNORED).expand(len(negatives))
    labels = torch.cat([label.new_ones(len(positives)), label])
    return cross_entropy(torch.cat([positives, negatives]), labels, ignore_index=IGNORED)
