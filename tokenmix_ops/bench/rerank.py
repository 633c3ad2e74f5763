"""Re-ranking: a video's cross-attention keys and values once, against once for every text.

``python -m tokenmix_ops.bench.rerank`` writes a row for each way of computing it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

from tokenmix_ops.bench.measure import environment, gpu_environment, ratio, time_side_by_side
from tokenmix_ops.bench.render import write_rows
from tokenmix_ops.bench.suites import Row
from tokenmix_ops.video.cross_attention import VideoMemory, share_video_keys

SHAPE = {"num_frames": 8, "num_tokens": 197, "dim": 768, "num_heads": 12, "num_layers": 12}
"""BLIP's base model at 224 pixels."""

ONCE, FOR_EVERY_TEXT = "once a video", "for every text"


def rerank_rows(
    *,
    videos: int = 1,
    texts: int = 128,
    length: int = 16,
    texts_at_once: int = 16,
    rounds: int = 3,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    shape: dict[str, int] = SHAPE,
    progress: Callable[[int], object] | None = None,
) -> list[Row]:
    """Seconds in which ``texts`` texts of ``length`` tokens are matched with each of ``videos``.

    "for every text" is transformers' text encoder, which is given the video's tokens again for
    each text; ``texts_at_once`` bounds its memory, and both have the same chunks. Weights are
    random. The row of "once a video" has the ratio of the two: median and quartiles.
    """
    config = BlipTextConfig(
        vocab_size=30_524,
        hidden_size=shape["dim"],
        encoder_hidden_size=shape["dim"],
        intermediate_size=4 * shape["dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(
        videos, shape["num_frames"] * shape["num_tokens"], shape["dim"], generator=generator
    ).to(device, dtype)
    input_ids = torch.randint(1000, 30_000, (texts, length), generator=generator).to(device)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return BlipTextModel(config, add_pooling_layer=False).to(device, dtype).eval()

    plain, sharing = build(), build()
    share_video_keys(sharing)

    def matched(model: nn.Module, videos_of: Callable[[Tensor, int], object]) -> Tensor:
        with torch.no_grad():
            rows = [
                model(
                    chunk,
                    attention_mask=torch.ones_like(chunk),
                    encoder_hidden_states=videos_of(video, len(chunk)),
                ).last_hidden_state[:, 0]
                for video, chunk in _pairs(model)
            ]
        found = torch.cat(rows)
        if found.is_cuda:
            torch.cuda.synchronize(found.device)
        return found

    raise NotImplementedError
