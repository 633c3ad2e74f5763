"""Finds the videos of an index that a text describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tokenmix_ops.video.data.clips import ClipError
from tokenmix_ops.video.retrieval.ranking import Track
from tokenmix_ops.video.search.index import Index
from tokenmix_ops.video.search.model import SearchModel
from tokenmix_ops.video.search.updating import untracked
from tokenmix_ops.video.text import clean_caption

_ROWS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Hit:
    """A result: its path relative to the folder, and its full path.

    ``similarity`` is the cosine of the embeddings; ``score`` equals it or, with re-ranking, adds
    the matching head's "yes". ``duration`` in seconds, None if unknown.
    """

    video: str
    path: Path
    score: float
    similarity: float
    duration: float | None


@dataclass(frozen=True)
class Answer:
    """A query and its results, best first."""

    query: str
    hits: tuple[Hit, ...]


def check(queries: Sequence[str], top: int, rerank: int) -> None:
    """Raise ValueError for a string instead of a list of queries, a query without words, ``top``
    below 1, or ``rerank`` below ``top`` and not 0."""
    if isinstance(queries, str):
        raise ValueError(f"queries must be a list of strings, got {queries!r}")
    for query in queries:
        if not clean_caption(query):
            raise ValueError(f"expected words in every query, got {query!r}")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    if rerank < 0 or 0 < rerank < top:
        raise ValueError(f"rerank must be 0 (off) or at least top = {top}, got {rerank}")


def search(
    model: SearchModel,
    index: Index,
    queries: Sequence[str],
    *,
    top: int = 5,
    rerank: int = 0,
    workers: int = 2,
    track: Track = untracked,
) -> list[Answer]:
    """Return the ``top`` videos for each query; equal scores are ordered by path.

    Reads the ``rerank`` most similar videos of each query again, each once for all queries, and
    ranks them by similarity plus the matching head's "yes". Cleans queries as training cleans
    captions. An answer's similarities do not depend on other queries. Source: BLIP.

    Raises ValueError as `check` does, and if a video to re-rank can no longer be read.
    """
    check(queries, top, rerank)
    entries = index.readable
    if not entries:
        return [Answer(query, ()) for query in queries]
    embeddings = torch.stack([e.embedding for e in entries if e.embedding is not None])
    similarities = [_similarities(embeddings, model.embed_text(query)) for query in queries]
    # Entries are sorted by path, and a stable sort keeps that order for ties.
    best = [s.argsort(descending=True, stable=True)[: rerank or top].tolist() for s in similarities]
    scores = [
        {row: float(s[row]) for row in rows} for s, rows in zip(similarities, best, strict=True)
    ]
    if rerank:
        wanted = sorted(set().union(*best))
        paths = [index.path_of(entries[row]) for row in wanted]
        clips = model.read(paths, workers)
        for row, clip in zip(track(wanted, "re-ranking"), clips, strict=True):
            if clip.pixels is None:
                raise ClipError(f"{index.path_of(entries[row])}: {clip.error}")
            asking = [number for number, rows in enumerate(best) if row in scores[number]]
            matches = model.match(clip.pixels, [queries[number] for number in asking])
            for number, match in zip(asking, matches, strict=True):
                scores[number][row] += match
    answers = []
    for query, similarity, found in zip(queries, similarities, scores, strict=True):
        rows = sorted(found, key=lambda row: (-found[row], row))[:top]
        hits = [
            Hit(
                entries[row].video,
                index.path_of(entries[row]),
                found[row],
                float(similarity[row]),
                entries[row].duration,
            )
            for row in rows
        ]
        answers.append(Answer(query, tuple(hits)))
    return answers


def _similarities(embeddings: Tensor, text: Tensor) -> Tensor:
    """Similarities [n]; equal rows score equally, which a matrix product does not guarantee."""
    return torch.cat([(rows * text).sum(dim=1) for rows in embeddings.split(_ROWS_AT_ONCE)])
