"""The demo's picture: strips of frames, learning curves, timings."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import matplotlib
from torch import Tensor
from torch.nn.functional import pad

from tokenmix_ops.peer_layers import LAYER_TITLES
from tokenmix_ops.timing import Timings
from tokenmix_ops.video.data.shapes import MOTIONS

COLOURS = {"spatial": "tab:gray", "released": "tab:blue"}


def draw(
    path: Path,
    clips: Tensor,
    labels: Tensor | None,
    predictions: dict[str, Tensor],
    curves: dict[str, list[float]],
    timings: dict[str, Timings],
) -> Path:
    """Write the picture and return its path; ``clips`` are RGB in 0..1."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    chosen = list(range(min(4, len(clips))))
    if labels is not None:
        # Show one clip of each motion present.
        first = {int(label): index for index, label in reversed(list(enumerate(labels)))}
        chosen = [first[motion] for motion in sorted(first)]
    figure = pyplot.figure(figsize=(12, 1.5 * len(chosen) + 4.5), layout="constrained")
    grid = figure.add_gridspec(len(chosen) + 1, 2, height_ratios=[1] * len(chosen) + [3])
    for row, index in enumerate(chosen):
        axes = figure.add_subplot(grid[row, :])
        frames = pad(clips[index], (1, 1), value=1.0)
        strip = frames.permute(2, 0, 3, 1).flatten(1, 2)
        axes.imshow(strip.numpy(), aspect="equal")
        axes.set_xticks([])
        axes.set_yticks([])
        if labels is not None:
            said = ", ".join(f"{name}: {MOTIONS[int(p[index])]}" for name, p in predictions.items())
            axes.set_title(f"moves {MOTIONS[int(labels[index])]}   ({said})", fontsize=10)
    axes = figure.add_subplot(grid[-1, 0])
    if curves:
        for name, curve in curves.items():
            window = max(1, len(curve) // 40)
            smooth = [
                sum(curve[max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window))
                for i in range(len(curve))
            ]
            axes.plot(smooth, label=name, color=COLOURS[name])
        axes.axhline(1.386, linestyle=":", color="black", label="guessing: log 4")
        axes.set(xlabel="step", ylabel="loss", title="direction of motion", ylim=(0, None))
        axes.legend()
    else:
        axes.axis("off")
    axes = figure.add_subplot(grid[-1, 1])
    names = list(timings["forward"])[::-1]
    for shift, (one_pass, of_pass) in enumerate(timings.items()):
        axes.barh(
            [y + 0.4 * (0.5 - shift) for y in range(len(names))],
            [1e3 * median(of_pass[name]) for name in names],
            height=0.38,
            label=one_pass,
        )
    axes.set_yticks(range(len(names)), [LAYER_TITLES[name] for name in names], fontsize=8)
    axes.set(xlabel="milliseconds", title="one attention layer, ViT-B/16")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
