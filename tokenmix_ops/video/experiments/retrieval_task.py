"""Text-video retrieval as a task: training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from tokenmix_ops.video.checkpoints import save_updated
from tokenmix_ops.video.data.dataset import collate
from tokenmix_ops.video.engine.progress import Progress
from tokenmix_ops.video.experiments.building import Loaded
from tokenmix_ops.video.experiments.configs import plain
from tokenmix_ops.video.experiments.settings import Retrieval
from tokenmix_ops.video.experiments.splits import Splits
from tokenmix_ops.video.metrics.recall import retrieval_scores
from tokenmix_ops.video.retrieval import RetrievalTraining, Scores, VideoRetriever, rank
from tokenmix_ops.video.text import CaptionTokenizer, clean_caption

Item = TypeVar("Item")


class TextBatch:
    """Collates clips and tokenises their texts, [CLS] first, all padded to ``max_tokens``."""

    def __init__(self, tokenizer: CaptionTokenizer, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """``pixels``, ``videos``, ``input_ids`` and ``attention_mask`` [batch, max_tokens]."""
        batch = collate(items)
        texts = [clean_caption(caption) for caption in batch.pop("captions")]
        ids, mask = self.tokenizer.encode(texts, self.max_tokens, pad_to_max=True)
        return {**batch, "input_ids": ids, "attention_mask": mask}


class RetrievalTask:
    """What the engine trains: a retriever with its losses, chosen by text-to-video R@1."""

    name = "retrieval"

    def __init__(self, loaded: Loaded, experiment: Retrieval, splits: Splits) -> None:
        assert isinstance(loaded.model, VideoRetriever)
        self.retriever, self.loaded = loaded.model, loaded
        self.experiment, self.splits = experiment, splits
        self.collate = TextBatch(loaded.tokenizer, experiment.max_tokens)
        contrast = experiment.contrast
        self.model = RetrievalTraining(
            loaded.model,
            queue_size=contrast.queue_size,
            momentum=contrast.momentum,
            alpha=contrast.alpha,
            temperature=contrast.temperature,
            seed=experiment.training.seed,
        )

    def kept(self) -> Iterable[str]:
        """The momentum copies."""
        return [f"momentum_copy.model.{name}" for name in self.model.momentum_copy.names]

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        """Pairs."""
        return float(len(batch["input_ids"]))

    def after_update(self) -> None:
        self.model.after_update()

    def evaluate(
        self, accelerator: Accelerator, split: str, progress: Progress
    ) -> dict[str, float]:
        """Recall, median and mean rank of a split; the score is text-to-video R@1."""
        figures = rank_split(
            self.loaded, self.splits, split, self.experiment, accelerator, progress
        )
        return {**figures, "score": figures["t2v R@1"]}

    def save_updated(self, path: Path, figures: Mapping[str, Any]) -> None:
        save_updated(
            path,
            self.retriever,
            base=self.loaded.name,
            settings=plain(self.experiment),
            figures=figures,
        )


def rank_split(
    loaded: Loaded,
    splits: Splits,
    split: str,
    experiment: Retrieval,
    accelerator: Accelerator,
    progress: Progress,
) -> dict[str, float]:
    """Retrieval figures of a split, its videos shared out among the processes."""
    model = loaded.model
    assert isinstance(model, VideoRetriever)
    batch_size, workers = experiment.training.batch_size, experiment.training.workers
    clips, loader = splits.evaluation_clips(split, batch_size, workers, accelerator)
    pairs = [(row, text) for row, video in enumerate(clips.videos) for text in video.captions]
    if not pairs:
        raise ValueError(f"no video of split {split!r} has a text to be found by")
    texts = [clean_caption(text) for _, text in pairs]

    def track(items: Iterable[Item], description: str) -> Iterable[Item]:
        return progress.track(items, f"{description} of {split}")

    with accelerator.autocast():
        scores = rank(
            model,
            loader,
            *loaded.tokenizer.encode(texts, experiment.max_tokens),
            num_videos=len(clips),
            rerank=experiment.rerank,
            track=track,
        )
    return figures_of(scores, torch.tensor([row for row, _ in pairs]))


def figures_of(scores: Scores, text_videos: Tensor) -> dict[str, float]:
    """Each direction's figures from its own scores, and their sum of recalls."""
    to_video = retrieval_scores(scores.text_to_video, text_videos)
    to_text = retrieval_scores(scores.video_to_text, text_videos)
    figures = {
        name: value
        for source, direction in ((to_video, "t2v"), (to_text, "v2t"))
        for name, value in source.items()
        if name.startswith(direction)
    }
    figures["rsum"] = sum(value for name, value in figures.items() if "R@" in name)
    return figures
