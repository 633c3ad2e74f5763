"""A retriever for search, which embeds one video or text at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenmix_ops.video.engine.placement import start_accelerator
from tokenmix_ops.video.experiments.evaluating import open_model
from tokenmix_ops.video.experiments.settings import Opening, Retrieval
from tokenmix_ops.video.retrieval import VideoRetriever
from tokenmix_ops.video.search.reading import Clips
from tokenmix_ops.video.text import clean_caption
from tokenmix_ops.video.tuning import Tuning, resolved

TEXTS_AT_ONCE = 128


class SearchModel:
    """Embeds videos and texts, and matches them.

    Encodes each video by itself, so its embedding depends only on the video, the model and the
    machine: it is bit-identical given the same versions and number of threads, or the same GPU.

    Args:
        checkpoint: a training checkpoint, its folder, or a whole model.
        opening: how to open it.
        precision: mixed precision: "no", "bf16" or "fp16".

    Raises ValueError as `open_model` does, and for fp16 on a CPU.
    """

    def __init__(
        self, checkpoint: str, opening: Opening | None = None, *, precision: Any = "no"
    ) -> None:
        loaded, experiment = open_model(checkpoint, Retrieval(), opening or Opening())
        assert isinstance(loaded.model, VideoRetriever)
        self.retriever, self.tokenizer = loaded.model.eval(), loaded.tokenizer
        self.max_tokens = experiment.max_tokens
        self.num_frames = self.retriever.encoder.num_frames
        self.image_size = self.retriever.encoder.image_size
        self.fps = experiment.videos.fps
        self.settings = {
            "model": _fingerprint(self.retriever),
            "num_frames": self.num_frames,
            "image_size": self.image_size,
            "fps": self.fps,
            "precision": precision,
        }
        """What embeddings depend on; an index only serves the settings it was made with."""
        self._accelerator = start_accelerator(replace(experiment.training, precision=precision))
        self.retriever.to(self._accelerator.device)

    def read(self, paths: Sequence[Path], workers: int) -> Clips:
        """Read clips as the model sees them, in order."""
        return Clips(paths, self.num_frames, self.image_size, self.fps, workers)

    @torch.no_grad()
    def embed_video(self, pixels: Tensor) -> Tensor:
        """Embed a normalised clip [T, 3, size, size]: unit vector [dim], float32 on the CPU."""
        with self._accelerator.autocast():
            embedding = self.retriever.embed_videos(self._placed(pixels)[None])
        return embedding[0].float().cpu()

    @torch.no_grad()
    def embed_text(self, text: str) -> Tensor:
        """Embed a text, cleaned as in training: unit vector [dim], float32 on the CPU."""
        with self._accelerator.autocast():
            embedding = self.retriever.embed_texts(*self._encoded([text]))
        return embedding[0].float().cpu()

    @torch.no_grad()
    def match(self, pixels: Tensor, texts: Sequence[str]) -> list[float]:
        """The matching head's "yes" logit for each text; the clip's keys are computed once."""
        found: list[float] = []
        with self._accelerator.autocast():
            tokens = self.retriever.encode_videos(self._placed(pixels)[None]).tokens
            memory = self.retriever.remember(tokens)
            for first in range(0, len(texts), TEXTS_AT_ONCE):
                chosen = self._encoded(texts[first : first + TEXTS_AT_ONCE])
                logits = self.retriever.match(*chosen, memory)
                found += logits[:, 1].float().tolist()
        return found

    def _encoded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = self.tokenizer.encode([clean_caption(text) for text in texts], self.max_tokens)
        return self._placed(ids), self._placed(mask)

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._accelerator.device)


def _fingerprint(retriever: VideoRetriever) -> str:
    """Hash everything that a video's embedding depends on: the tuning and the exact weights.

    Excludes the position embeddings: loading resizes them, and the result's last bits differ
    between machines.
    """
    digest = hashlib.sha256()
    tuning = resolved(retriever.tuning or Tuning("frozen"))
    digest.update(json.dumps(asdict(tuning), sort_keys=True).encode())
    parts: tuple[nn.Module, ...] = (retriever.encoder, retriever.vision_proj)
    for part in parts:
        for name, value in sorted(part.state_dict().items()):
            if not name.endswith("position_embedding"):
                digest.update(f"{name} {list(value.shape)} {value.dtype} ".encode())
                digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
