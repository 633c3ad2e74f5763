"""Recall at 1, 5 and 10, and median and mean rank, from texts to videos and back."""

from __future__ import annotations

import torch
from torch import Tensor


def retrieval_scores(similarity: Tensor, text_videos: Tensor) -> dict[str, float]:
    """Score the ranks of the right videos among all videos, and of the right texts among all texts.

    ``similarity`` is [num_texts, num_videos], more is better; ``text_videos``, int64 [num_texts],
    is the row of each text's video; a video may have several texts. Text to video ("t2v") takes
    every text; video to text ("v2t") takes every video that has a text, and counts its best one.
    Whatever ties with the right one counts as before it. Returns, for both directions, "t2v R@1",
    "t2v R@5" and "t2v R@10" in percent, "t2v MedR" and "t2v MeanR", ranks from 1; and "rsum", the
    sum of the six recalls. Raises ValueError for other shapes, rows out of range, and NaN.
    """
    _check(similarity, text_videos)
    similarity = similarity.detach()
    rows = text_videos.to(similarity.device)
    num_videos = similarity.shape[1]
    right = similarity.gather(1, rows[:, None]).squeeze(1)
    # The right video is among those that are at least as similar as it, and makes the rank.
    video_ranks = (similarity >= right[:, None]).sum(1)

    texts_of = rows.bincount(minlength=num_videos)
    best = right.new_zeros(num_videos).scatter_reduce(0, rows, right, "amax", include_self=False)
    own = rows[right >= best[rows]].bincount(minlength=num_videos)
    # A tie among the texts of one video costs it nothing.
    text_ranks = ((similarity >= best).sum(0) - own + 1)[texts_of > 0]

    figures = {**_figures("t2v", video_ranks), **_figures("v2t", text_ranks)}
    figures["rsum"] = sum(value for name, value in figures.items() if "R@" in name)
    return figures


def _figures(direction: str, ranks: Tensor) -> dict[str, float]:
    ranks = ranks.double()
    middle = ranks.sort().values[[(len(ranks) - 1) // 2, len(ranks) // 2]]
    return {
        **{f"{direction} R@{k}": 100 * float((ranks <= k).double().mean()) for k in (1, 5, 10)},
        f"{direction} MedR": float(middle.mean()),
        f"{direction} MeanR": float(ranks.mean()),
    }


def _check(similarity: Tensor, text_videos: Tensor) -> None:
    for name, value in (("similarity", similarity), ("text_videos", text_videos)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if similarity.dim() != 2 or similarity.numel() == 0:
        raise ValueError(
            f"similarity has shape {list(similarity.shape)}, it must be [num_texts, num_videos], "
            "at least one each"
        )
    num_texts, num_videos = similarity.shape
    if text_videos.dtype != torch.int64 or text_videos.shape != (num_texts,):
        raise ValueError(
            f"text_videos is {text_videos.dtype} of shape {list(text_videos.shape)}, "
            f"it must be torch.int64 of shape [{num_texts}], as similarity has {num_texts} texts"
        )
    if text_videos.min() < 0 or text_videos.max() >= num_videos:
        raise ValueError(
            f"text_videos goes from {int(text_videos.min())} to {int(text_videos.max())}, "
            f"it must be from 0 to {num_videos - 1}, as similarity has {num_videos} videos"
        )
    if similarity.isnan().any():
        broken = int(similarity.isnan().any(1).sum())
        raise ValueError(f"similarity is NaN in {broken} of its {num_texts} rows")
