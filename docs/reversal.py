"""Draws docs/reversal.png: a clip, its reverse, and what a spatial and a mixing tower make of them.

python docs/reversal.py
"""

from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from torch.nn.functional import pad

from tokenmix_ops.video.data.clips import normalize_clip
from tokenmix_ops.video.data.shapes import MOTIONS, render, sample_scenes
from tokenmix_ops.video.demo import motion

TOWERS = {"spatial": "plain attention", "released": "token mixing, the same weights"}


def a_clip_that_moves(direction):
    """[num_frames, 3, height, width] in 0..1 of one shape on its way."""
    scenes = sample_scenes(32, motion.NUM_FRAMES, torch.Generator().manual_seed(7))
    chosen = scenes.motion.tolist().index(MOTIONS.index(direction))
    return render(scenes, 4 * motion.IMAGE_SIZE)[chosen], render(scenes, motion.IMAGE_SIZE)[chosen]


def embeddings(mixing, clip):
    """Pooled embeddings [2, dim] of a clip and its reverse, by a tower of random weights."""
    encoder = motion.build(mixing).encoder.eval()
    both = torch.stack([clip, clip.flip(0)])
    with torch.no_grad():
        return encoder(normalize_clip(both)).pooled


def main():
    matplotlib.use("agg")
    large, small = a_clip_that_moves("right")
    figure = pyplot.figure(figsize=(11, 3.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.5, 1])
    for row, (name, clip) in enumerate({"a clip": large, "its reverse": large.flip(0)}.items()):
        axes = figure.add_subplot(grid[row, 0])
        strip = pad(clip, (2, 2), value=1.0).permute(2, 0, 3, 1).flatten(1, 2)
        axes.imshow(strip.clamp(0, 1).numpy())
        axes.set_title(name, loc="left", fontsize=11)
        axes.axis("off")
    for row, (mixing, name) in enumerate(TOWERS.items()):
        clip, reverse = embeddings(mixing, small)
        size = float((clip - reverse).norm() / clip.norm())
        axes = figure.add_subplot(grid[row, 1])
        axes.bar(range(len(clip)), (clip - reverse).numpy(), color="tab:blue", width=0.8)
        axes.axhline(0, color="black", linewidth=0.8)
        verdict = "cannot tell them apart" if size < 1e-6 else f"{size:.0%} apart"
        axes.set_title(f"{name}: {verdict}", loc="left", fontsize=11)
        axes.set(xticks=[], yticks=[], ylim=(-0.25, 0.25))
        axes.set_xlabel("embedding of the clip minus that of its reverse, by dimension", fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
