"""Video captioning as a task: training, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from tokenmix_ops.video.captioning import VideoCaptioner
from tokenmix_ops.video.checkpoints import save_updated
from tokenmix_ops.video.data.dataset import collate
from tokenmix_ops.video.engine.progress import Progress
from tokenmix_ops.video.engine.together import by_first
from tokenmix_ops.video.experiments.building import Loaded
from tokenmix_ops.video.experiments.configs import plain
from tokenmix_ops.video.experiments.settings import Captioning, Decoding
from tokenmix_ops.video.experiments.splits import Splits
from tokenmix_ops.video.metrics.captions import caption_scores, scorers
from tokenmix_ops.video.text import CaptionTokenizer, clean_caption


class CaptionBatch:
    """Collates clips and tokenises their captions, [DEC] first."""

    def __init__(self, tokenizer: CaptionTokenizer, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """``pixels``, ``videos``, ``input_ids`` and ``attention_mask`` [batch, length]."""
        batch = collate(items)
        captions = [clean_caption(caption) for caption in batch.pop("captions")]
        ids, mask = self.tokenizer.encode(captions, self.max_tokens, first="[DEC]")
        return {**batch, "input_ids": ids, "attention_mask": mask}


class CaptioningTraining(nn.Module):
    """A captioner as the engine calls it."""

    def __init__(self, captioner: VideoCaptioner) -> None:
        super().__init__()
        self.captioner = captioner

    def forward(self, batch: Mapping[str, Tensor], epoch: float) -> dict[str, Tensor]:
        """The mean loss over the captions' tokens; ``epoch`` does not matter."""
        loss = self.captioner(batch["pixels"], batch["input_ids"], batch["attention_mask"])
        return {"loss": loss}


class CaptioningTask:
    """What the engine trains: a captioner, chosen by CIDEr + BLEU-4.

    Raises ModuleNotFoundError if it will be chosen by scores, and there is nothing to score with.
    """

    name = "captioning"

    def __init__(self, loaded: Loaded, experiment: Captioning, splits: Splits) -> None:
        assert isinstance(loaded.model, VideoCaptioner)
        if experiment.videos.select_on != "none":
            scorers()
        self.captioner, self.loaded = loaded.model, loaded
        self.experiment, self.splits = experiment, splits
        self.collate = CaptionBatch(loaded.tokenizer, experiment.max_tokens)
        self.model = CaptioningTraining(loaded.model)

    def kept(self) -> Iterable[str]:
        return ()

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        """Tokens that the decoder has to predict."""
        return float(batch["attention_mask"][:, 1:].sum())

    def after_update(self) -> None:
        return None

    def evaluate(
        self, accelerator: Accelerator, split: str, progress: Progress
    ) -> dict[str, float | str]:
        """BLEU, ROUGE-L and CIDEr of a split; the score is CIDEr + BLEU-4.

        On tokens of our own: which epoch is the best must not depend on whether Java is there.
        """
        videos = self.splits.manifest.of_split(split)
        references = {video.video_id: video.captions for video in videos}
        predicted = caption_split(
            self.loaded, self.splits, split, self.experiment, accelerator, progress
        )
        scores = by_first(
            lambda: caption_scores(predicted, references, tokenizer="python", meteor=False)
        )
        score = scores.figures["CIDEr"] + scores.figures["BLEU-4"]
        return {**scores.figures, "score": score, "tokenizer": scores.tokenizer}

    def save_updated(self, path: Path, figures: Mapping[str, Any]) -> None:
        save_updated(
            path,
            self.captioner,
            base=self.loaded.name,
            settings=plain(self.experiment),
            figures=figures,
        )


def caption_split(
    loaded: Loaded,
    splits: Splits,
    split: str,
    experiment: Captioning,
    accelerator: Accelerator,
    progress: Progress,
) -> dict[str, str]:
    """Captions of a split's videos by id, shared out among the processes; all get all of them."""
    model = loaded.model
    assert isinstance(model, VideoCaptioner)
    batch_size, workers = experiment.training.batch_size, experiment.training.workers
    clips, loader = splits.evaluation_clips(split, batch_size, workers, accelerator)
    training = model.training
    model.eval()
    captions: list[tuple[str, str]] = []
    try:
        with accelerator.autocast():
            for batch in progress.track(loader, f"captions of {split}"):
                pixels = batch["pixels"].to(accelerator.device)
                texts = write_captions(model, loaded.tokenizer, pixels, experiment.decoding)
                ids = [clips.videos[row].video_id for row in batch["videos"].tolist()]
                captions += zip(ids, texts, strict=True)
    finally:
        model.train(training)
    return dict(gather_object(captions))


def write_captions(
    captioner: VideoCaptioner,
    tokenizer: CaptionTokenizer,
    pixels: Tensor,
    decoding: Decoding,
    num_captions: int = 1,
) -> list[str]:
    """Captions of videos [batch, num_frames, 3, height, width], ``num_captions`` of each."""
    ids = captioner.generate(
        pixels,
        num_beams=max(decoding.num_beams, num_captions if decoding.top_p is None else 1),
        min_length=decoding.min_length,
        max_length=decoding.max_length,
        top_p=decoding.top_p,
        num_captions=num_captions,
    )
    return tokenizer.decode(ids)
