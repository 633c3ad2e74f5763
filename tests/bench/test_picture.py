"""The picture of a run: who is in it, and an axis that can be read."""

import pytest

pytest.importorskip("matplotlib")
import matplotlib.figure

from bench.picture import draw


def row(contender, ms):
    about = {"part": "operator", "shape": "main", "pass": "forward", "hardware": "NVIDIA H200"}
    return {**about, "contender": contender, "median_ms": ms, "rounds_ms": [ms] * 3}


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved."""
    figures = []
    real = matplotlib.figure.Figure.savefig

    def savefig(figure, *arguments, **options):
        real(figure, *arguments, **options)
        figures.append(figure)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return figures


def test_contenders_with_bars_are_named_in_their_colours(drawn, tmp_path):
    draw([row("triton", 1.0), row("naive_gather", 20.0), row("flex", 1.5)], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "naive gather",
        "gather + FlexAttention",
    ]
    colours = [patch.get_facecolor() for patch in legend.get_patches()]
    assert colours == [bar.get_facecolor() for bar in drawn[0].axes[0].patches]
    assert len(set(colours)) == 2


def test_the_axis_has_ticks_where_all_are_alike(drawn, tmp_path):
    draw([row("triton", 1.0), row("eager", 1.0)], tmp_path / "a.png")
    axes = drawn[0].axes[0]
    low, high = axes.get_ylim()
    assert [tick for tick in axes.get_yticks() if low <= tick <= high] == [0.5, 1, 2]
