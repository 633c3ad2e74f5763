"""The matching loss (ITM) and its hard negatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tokenmix_ops.video.retrieval.contrastive import Features

IGNORED = -100


class Negatives(NamedTuple):
    """Indices int64 [n] of a negative text and a negative video for each pair of a batch.

    ``exist`` is a scalar, false if all pairs share one video and there are no negatives.
    """

    texts: Tensor
    videos: Tensor
    exist: Tensor


@torch.no_grad()
def draw_negatives(
    features: Features, temperature: Tensor, generator: torch.Generator
) -> Negatives:
    """Draw hard negatives from the softmax of similarity over temperature.

    Never draws a pair with the same video. ``features`` are the global batch's; ``generator`` is a
    CPU generator with the same state on all processes, so that they draw the same. Source: ALBEF;
    BLIP.
    """
    with torch.autocast(features.video.device.type, enabled=False):
        count = len(features.ids)
        # The Gumbel-max trick: the argmax of logits plus Gumbel noise samples their softmax, which
        # itself could underflow to all zeros at a low temperature.
        noise = -torch.empty(2, count, count).exponential_(generator=generator).log()
        noise = noise.to(features.video.device, features.video.dtype)
        similarity = features.video @ features.text.T
        same = features.ids[:, None] == features.ids
        logits = torch.stack([similarity, similarity.T]) / temperature + noise
        texts, videos = logits.masked_fill(same, -torch.inf).argmax(dim=2)
        return Negatives(texts, videos, ~same.all())


def matching_loss(positives: Tensor, negatives: Tensor, exist: Tensor) -> Tensor:
    """Mean cross-entropy of the logits of positive pairs [n, 2] and negative pairs [2 * n, 2].

    Ignores the negatives if there are none (`Negatives.exist`).
    """
    label = torch.where(exist, 0, IGNORED).expand(len(negatives))
    labels = torch.cat([label.new_ones(len(positives)), label])
    return cross_entropy(torch.cat([positives, negatives]), labels, ignore_index=IGNORED)
