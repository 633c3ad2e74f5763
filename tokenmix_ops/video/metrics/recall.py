"""Recall at 1, 5 and 10, median rank and mean rank, for text to video and video to text."""

from __future__ import annotations

import torch
from torch import Tensor


def retrieval_scores(similarity: Tensor, text_videos: Tensor) -> dict[str, float]:
    """Rank the matching video among all videos for each text, and vice versa.

    ``similarity`` is [num_texts, num_videos], higher is better; ``text_videos``, int64 [num_texts],
    is the index of each text's video; a video may have several texts. Text to video ("t2v") ranks
    every text; video to text ("v2t") ranks every video that has a text, by its best one. Ties rank
    ahead of the match. Returns, for both directions, "t2v R@1", "t2v R@5" and "t2v R@10" in
    percent, "t2v MedR" and "t2v MeanR", ranks from 1; and "rsum", the sum of the six recalls.
    Raises ValueError for other shapes, indices out of range, and NaN.
    """
    _check(similarity, text_videos)
    similarity = similarity.detach()
    rows = text_videos.to(similarity.device)
    num_videos = similarity.shape[1]
    right = similarity.gather(1, rows[:, None]).squeeze(1)
    # The count of videos at least as similar as the match, itself included, is the rank.
    video_ranks = (similarity >= right[:, None]).sum(1)

    texts_of = rows.bincount(minlength=num_videos)
    best = right.new_zeros(num_videos).scatter_reduce(0, rows, right, "amax", include_self=False)
    own = rows[right >= best[rows]].bincount(minlength=num_videos)
    # Ties among a video's own texts do not lower its rank.
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
            "expected similarity [num_texts, num_videos], each at least 1, got "
            f"{list(similarity.shape)}"
        )
    num_texts, num_videos = similarity.shape
    if text_videos.dtype != torch.int64 or text_videos.shape != (num_texts,):
        raise ValueError(
            f"expected text_videos to be torch.int64 [{num_texts}], one per text of similarity, "
            f"got {text_videos.dtype} {list(text_videos.shape)}"
        )
    if text_videos.min() < 0 or text_videos.max() >= num_videos:
        raise ValueError(
            f"expected text_videos from 0 to {num_videos - 1}, as similarity has {num_videos} "
            f"videos, got {int(text_videos.min())} to {int(text_videos.max())}"
        )
    if similarity.isnan().any():
        broken = int(similarity.isnan().any(1).sum())
        raise ValueError(f"similarity is NaN in {broken} of its {num_texts} rows")
