"""Ranks videos for texts and texts for videos: similarity for all, matching for the best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from tokenmix_ops.video.retrieval.gathering import GlobalBatch
from tokenmix_ops.video.retrieval.retriever import VideoRetriever

Item = TypeVar("Item")

TEXTS_AT_ONCE = 128


class Track(Protocol):
    """Passes items through and shows progress."""

    def __call__(self, items: Iterable[Item], description: str, /) -> Iterable[Item]: ...


def _untracked(items: Iterable[Item], _: str) -> Iterable[Item]:
    return items


class Scores(NamedTuple):
    """Scores of all pairs, float [num_texts, num_videos] on the CPU, higher is better.

    A row of ``text_to_video`` ranks the videos for a text, a column of ``video_to_text`` the texts
    for a video. The two are equal without re-ranking.
    """

    text_to_video: Tensor
    video_to_text: Tensor


@torch.no_grad()
def rank(
    retriever: VideoRetriever,
    clips: Iterable[Mapping[str, Tensor]],
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    num_videos: int,
    rerank: int = 128,
    track: Track = _untracked,
) -> Scores:
    """Score all texts against all videos; every process gets the same result.

    The ``rerank`` most similar videos of each text, and texts of each video, are scored by
    similarity plus the matching head's "yes"; all others rank below them, in order of similarity.
    Reads and encodes each video once, and computes its cross-attention keys and values once for all
    texts in both directions. Tokens wait for re-ranking on the CPU, because decoding again would
    take longer, and without loss in the type that cross-attention reads (16 bits under autocast).
    With BLIP's base model at 224 pixels, a video then takes 2.4 MB, twice that in float32.
    Source: BLIP.

    Args:
        clips: this process's shard of the videos: batches with "pixels" [n, T, 3, H, W] and
            "videos" int64 [n], their indices. Duplicates are harmless.
        input_ids, attention_mask: all texts [num_texts, length], starting with [CLS].
        num_videos: number of videos over all processes.
        rerank: number of candidates; 0 uses only similarity and computes only the [CLS] rows.
        track: wraps the clips, then the videos to re-rank, to show progress.

    Raises ValueError if videos are missing or out of range, or ``rerank`` is negative.
    """
    if rerank < 0:
        raise ValueError(f"rerank must not be negative, got {rerank}")
    with _evaluating(retriever):
        texts = _Texts(input_ids, attention_mask, next(retriever.parameters()).device)
        ids, embeddings, tokens = _encode(retriever, track(clips, "videos"), rerank > 0)
        own = torch.tensor(ids, dtype=torch.int64, device=texts.device)
        everyone = GlobalBatch.around(len(ids), 0, texts.device)
        all_ids = everyone.gather(own).cpu()
        _check(all_ids.tolist(), num_videos)
        videos = _placed(everyone.gather(embeddings).cpu(), all_ids, num_videos)
        embedded = texts.embeddings(retriever)
        # Under autocast the product would be in 16 bits and tie many videos.
        with torch.autocast(embedded.device.type, enabled=False):
            similarity = embedded @ videos.T
        if not rerank:
            return Scores(similarity, similarity)
        by_text = _best(similarity, rerank, dim=1)
        by_video = _best(similarity, rerank, dim=0)
        wanted = by_text | by_video
        matches = torch.full((len(ids), len(input_ids)), torch.nan, device=texts.device)
        for row in track(range(len(ids)), "re-ranking"):
            video = ids[row]
            memory = retriever.remember(tokens[row].to(texts.device)[None])
            for chosen in texts.chunks(wanted[:, video].nonzero().squeeze(1)):
                logits = retriever.match(*texts.trimmed(chosen), memory)
                matches[row, chosen.to(texts.device)] = logits[:, 1].float()
        yes = _placed(everyone.gather(matches).cpu(), all_ids, num_videos).T
    return Scores(_reranked(similarity, yes, by_text), _reranked(similarity, yes, by_video))


class _Texts:
    """All texts, in chunks of similar length to minimise padding."""

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, device: torch.device) -> None:
        if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
            raise ValueError(
                "input_ids and attention_mask must be [num_texts, length], got "
                f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
            )
        self.ids, self.mask, self.device = input_ids.cpu(), attention_mask.cpu(), device
        self.lengths = self.mask.sum(dim=1)

    def chunks(self, chosen: Tensor) -> Iterator[Tensor]:
        by_length = chosen[self.lengths[chosen].argsort(stable=True)]
        return (chunk for chunk in by_length.split(TEXTS_AT_ONCE) if len(chunk))

    def trimmed(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask of the chosen texts, cut to the longest of them."""
        length = int(self.lengths[chosen].max())
        ids, mask = self.ids[chosen, :length], self.mask[chosen, :length]
        return ids.to(self.device), mask.to(self.device)

    def embeddings(self, retriever: VideoRetriever) -> Tensor:
        found = torch.empty(len(self.ids), retriever.text_proj.out_features)
        for chosen in self.chunks(torch.arange(len(self.ids))):
            found[chosen] = retriever.embed_texts(*self.trimmed(chosen)).float().cpu()
        return found


@contextmanager
def _evaluating(retriever: VideoRetriever) -> Iterator[None]:
    training = retriever.training
    retriever.eval()
    try:
        yield
    finally:
        retriever.train(training)


def _encode(
    retriever: VideoRetriever,
    clips: Iterable[Mapping[str, Tensor]],
    with_tokens: bool,
) -> tuple[list[int], Tensor, list[Tensor]]:
    """Return this process's video indices, embeddings (on the device) and tokens (on the CPU)."""
    device = next(retriever.parameters()).device
    autocast = torch.is_autocast_enabled(device.type)
    ids: list[int] = []
    embeddings = [torch.empty(0, retriever.vision_proj.out_features, device=device)]
    tokens: list[Tensor] = []
    for batch in clips:
        pixels = batch["pixels"].to(device)
        if with_tokens:
            encoded = retriever.encode_videos(pixels)
            read_as = torch.get_autocast_dtype(device.type) if autocast else encoded.tokens.dtype
            tokens.extend(encoded.tokens.to(read_as).cpu())
            embedding = encoded.embedding
        else:
            embedding = retriever.embed_videos(pixels)
        embeddings.append(embedding.float())
        ids += batch["videos"].tolist()
    return ids, torch.cat(embeddings), tokens


def _check(ids: list[int], num_videos: int) -> None:
    # Check the ids of all processes, so that all raise and none deadlocks.
    wrong = sorted(set(ids) ^ set(range(num_videos)))
    if wrong:
        state = "out of range" if wrong[0] in ids else "missing"
        raise ValueError(
            f"expected clips of all processes to cover videos 0 to {num_videos - 1}, but "
            f"{wrong[0]} is {state}"
        )


def _placed(rows: Tensor, ids: Tensor, count: int) -> Tensor:
    """Scatter rows to [count, ...] by id."""
    placed = rows.new_empty(count, *rows.shape[1:])
    placed[ids] = rows
    return placed


def _best(similarity: Tensor, count: int, dim: int) -> Tensor:
    """Return a mask of the ``count`` largest entries along ``dim``."""
    best = similarity.topk(min(count, similarity.shape[dim]), dim=dim).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(dim, best, True)


def _reranked(similarity: Tensor, yes: Tensor, chosen: Tensor) -> Tensor:
    scores = yes + similarity
    others = similarity - similarity.max() + scores[chosen].min() - 1
    return torch.where(chosen, scores, others)
