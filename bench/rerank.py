"""Re-ranking: a video's cross-attention keys and values once, against once for every text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel

from bench.rows import Row
from tokenmix_ops.timing import environment, ratio, time_side_by_side
from tokenmix_ops.video.cross_attention import VideoMemory, share_video_keys

BASE = {"num_frames": 8, "num_tokens": 197, "dim": 768, "num_heads": 12, "num_layers": 12}
"""BLIP's base model at 224 pixels."""

ONCE, FUSED, PLAIN = "once_a_video", "for_every_text_fused", "for_every_text"


def rerank_rows(
    *,
    videos: int = 1,
    texts: int = 128,
    length: int = 16,
    texts_at_once: int = 16,
    rounds: int = 3,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    sizes: Mapping[str, int] = BASE,
    commit: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Row]:
    """Milliseconds in which ``texts`` texts of ``length`` tokens are matched with each video.

    "for_every_text" is transformers' own text encoder, which projects a video's tokens for each
    text; "for_every_text_fused" the same with this package's cross-attention, so that what is left
    to "once_a_video" is the keys and values alone. All take ``texts_at_once``, which bounds the
    memory of the first; weights are random. Rows carry how many times faster "once_a_video" is,
    median and quartiles of the rounds, and the largest difference from its result.
    """
    config = BlipTextConfig(
        vocab_size=30_524,
        hidden_size=sizes["dim"],
        encoder_hidden_size=sizes["dim"],
        intermediate_size=4 * sizes["dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
    )
    generator = torch.Generator().manual_seed(0)
    shape = videos, sizes["num_frames"] * sizes["num_tokens"], sizes["dim"]
    tokens = torch.randn(shape, generator=generator).to(device, dtype)
    input_ids = torch.randint(1000, 30_000, (texts, length), generator=generator).to(device)
    contenders = {
        ONCE: _once(_model(config, tokens, shared=True), tokens, input_ids, texts_at_once),
        FUSED: _repeated(_model(config, tokens, shared=True), tokens, input_ids, texts_at_once),
        PLAIN: _repeated(_model(config, tokens, shared=False), tokens, input_ids, texts_at_once),
    }
    results = {name: run() for name, run in contenders.items()}
    timings = time_side_by_side(contenders, rounds, progress)
    rows = []
    for name, seconds in timings.items():
        middle, low, high = ratio(timings, name, ONCE)
        rows.append(
            {
                "suite": "rerank",
                "device": device,
                "dtype": str(dtype).removeprefix("torch."),
                "videos": videos,
                "texts": texts,
                "length": length,
                "texts_at_once": texts_at_once,
                **sizes,
                "contender": name,
                "median_ms": round(1e3 * median(seconds), 2),
                "rounds_ms": [round(1e3 * s, 2) for s in seconds],
                "ratio": round(middle, 2),
                "ratio_quartiles": [round(low, 2), round(high, 2)],
                "difference": float((results[name] - results[ONCE]).abs().max()),
                **environment(device, commit),
            }
        )
    return rows


def _model(config: BlipTextConfig, tokens: Tensor, *, shared: bool) -> BlipTextModel:
    torch.manual_seed(0)
    model = BlipTextModel(config, add_pooling_layer=False).eval()
    cast(nn.Module, model).to(tokens.device, tokens.dtype)
    if shared:
        share_video_keys(model)
    return model


def _once(
    model: BlipTextModel, tokens: Tensor, input_ids: Tensor, texts_at_once: int
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        found = []
        for video in tokens:
            memory = VideoMemory(video[None])
            found += [_first(model, chunk, memory) for chunk in input_ids.split(texts_at_once)]
        return _done(found)

    return run


def _repeated(
    model: BlipTextModel, tokens: Tensor, input_ids: Tensor, texts_at_once: int
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        return _done(
            [
                _first(model, chunk, video.expand(len(chunk), -1, -1))
                for video in tokens
                for chunk in input_ids.split(texts_at_once)
            ]
        )

    return run


@torch.no_grad()
def _first(model: BlipTextModel, input_ids: Tensor, video: Any) -> Tensor:
    """What the matching head reads."""
    mask = torch.ones_like(input_ids)
    output = model(input_ids, attention_mask=mask, encoder_hidden_states=video)
    return output.last_hidden_state[:, 0].float()


def _done(found: list[Tensor]) -> Tensor:
    result = torch.cat(found)
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result
