"""The demo's task: classify the direction of motion with a small BLIP tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tokenmix_ops.mixing import Mixing
from tokenmix_ops.video.blip import blip_vision_config
from tokenmix_ops.video.data.clips import normalize_clip, read_clip
from tokenmix_ops.video.data.shapes import MOTIONS, render, sample_scenes
from tokenmix_ops.video.encoder import VideoEncoder

NUM_FRAMES = 8
# A 7 x 7 grid: if its width were a multiple of T, p mod T would depend only on the column.
IMAGE_SIZE, PATCH_SIZE = 56, 8
BATCH, LEARNING_RATE = 32, 3e-3


class MotionClassifier(nn.Module):
    """A linear head on the pooled embedding of a two-layer BLIP tower of width 64."""

    def __init__(self, mixing: Mixing | str) -> None:
        super().__init__()
        config = blip_vision_config(
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.06,
        )
        self.encoder = VideoEncoder(config, num_frames=NUM_FRAMES, mixing=mixing)
        self.head = nn.Linear(64, len(MOTIONS))

    def forward(self, pixels: Tensor) -> Tensor:
        """Map normalised pixels [batch, num_frames, 3, height, width] to logits [batch, 4]."""
        return self.head(self.encoder(pixels).pooled)


def build(mixing: Mixing | str, seed: int = 0) -> MotionClassifier:
    """Build a classifier whose initial weights depend only on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MotionClassifier(mixing)


def train(
    model: MotionClassifier,
    steps: int,
    seed: int = 0,
    progress: Callable[[int, float], object] | None = None,
) -> list[float]:
    """Train on newly rendered clips at every step; return the loss of each step.

    Calls ``progress`` with the number of steps done and the latest loss.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        scenes = sample_scenes(BATCH, NUM_FRAMES, generator)
        logits = model(normalize_clip(render(scenes, IMAGE_SIZE)))
        loss = cross_entropy(logits, scenes.motion)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(step + 1, losses[-1])
    return losses


def read(paths: Sequence[Path]) -> Tensor:
    """Read video files as clips [len(paths), num_frames, 3, height, width] in 0..1."""
    return torch.stack([read_clip(path, NUM_FRAMES, IMAGE_SIZE) for path in paths])


@torch.no_grad()
def predict(model: MotionClassifier, clips: Tensor) -> Tensor:
    """Predict the `MOTIONS` index of each clip [count, num_frames, 3, height, width] in 0..1."""
    parts = [model(normalize_clip(part)).argmax(-1) for part in clips.split(64)]
    return torch.cat(parts)
