"""Which videos of an index a text describes."""

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
    """A video that was found: its path below the folder, and where that is.

    ``similarity`` is the cosine of the embeddings; ``score`` is the same or, re-ranked, its sum
    with the matching head's "yes". ``duration`` in seconds, None where unknown.
    """

    video: str
    path: Path
    score: float
    similarity: float
    duration: float | None


@dataclass(frozen=True)
class Answer:
    """A query, and what was found, the best first."""

    query: str
    hits: tuple[Hit, ...]


def check(queries: Sequence[str], top: int, rerank: int) -> None:
    """Raises ValueError for what `search` cannot do: one text in place of a list, a query without
    words, ``top`` below 1, or ``rerank`` below ``top`` and not 0."""
    if isinstance(queries, str):
        raise ValueError(f"queries must be a list of texts, got the text {queries!r}")
    for query in queries:
        if not clean_caption(query):
            raise ValueError(f"query {query!r} has no words")
    if top < 1:
        raise ValueError(f"top is {top}, it must be at least 1")
    if rerank < 0 or 0 < rerank < top:
        raise ValueError(
            f"rerank is {rerank}, it must be 0, for none, or at least the {top} of top"
        )


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
    """The ``top`` videos for each query; of equal scores, the first path comes first.

    With ``rerank`` the most similar so many videos of each query are read again and ranked by the
    sum of similarity and the matching head's "yes", each video once for all queries. Queries are
    cleaned as captions are in training; an answer's similarities do not depend on other queries.
    Source: design.md, section 4; BLIP.

    Raises ValueError as `check` does, and if a video to re-rank can no longer be read.
    """
    check(queries, top, rerank)
    entries = index.readable
    if not entries:
        return [Answer(query, ()) for query in queries]
    embeddings = torch.stack([e.embedding for e in entries if e.embedding is not None])
    similarities = [_similarities(embeddings, model.embed_text(query)) for query in queries]
    # A stable sort, and entries are by path.
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
    """[n]; rows that are equal give what is equal, which a matrix product does not promise."""
    return torch.cat([(rows * text).sum(dim=1) for rows in embeddings.split(_ROWS_AT_ONCE)])
