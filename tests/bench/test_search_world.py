"""The figures of search on the small video world."""

from pathlib import Path

import pytest

pytest.importorskip("av")
pytest.importorskip("accelerate")
pytest.importorskip("tyro")

from bench.search_world import figures
from bench.tables import TABLES
from tokenmix_ops.video.search import Answer, Hit

CAPTIONS = {
    "a.mp4": ("a red circle moves left", "the red circle goes from right to left"),
    "b.mp4": ("a red circle moves left", "the red circle goes from right to left"),
    "c.mp4": ("a red square moves up", "the red square goes from bottom to top"),
    "d.mp4": ("a blue square moves left", "the blue square goes from right to left"),
}


def answer(query, *names):
    hits = (Hit(f"{name}.mp4", Path("world") / f"{name}.mp4", 0.5, 0.5, 2.0) for name in names)
    return Answer(query, tuple(hits))


def test_figures_count_captions_of_clips_and_know_chance():
    found = figures(
        [
            answer("a red circle moves left", "b", "c"),
            answer("the red circle goes from right to left", "c", "a"),
            answer("a red square moves up", "b", "d"),
            answer("the red square goes from bottom to top", "c", "d"),
            answer("a blue square moves left", "a", "b"),
            answer("the blue square goes from right to left", "c", "d"),
        ],
        CAPTIONS,
        top=2,
    )
    assert found == {
        "top_1": pytest.approx(100 * 3 / 8),
        "top_2": pytest.approx(100 * 6 / 8),
        "chance_1": pytest.approx(100 * (4 * 2 / 4 + 4 * 1 / 4) / 8),
        "chance_2": pytest.approx(100 * (4 * 5 / 6 + 4 * 1 / 2) / 8),
        "colour": pytest.approx(100 * 6 / 8),
        "shape": pytest.approx(100 * 4 / 8),
        "motion": pytest.approx(100 * 4 / 8),
    }


def test_the_table_says_which_index_was_not_the_same():
    row = {
        "checkpoint": "token_mixing-F", "rerank": 0, "top_1": 50.0, "top_5": 98.5, "colour": 100.0,
        "shape": 99.0, "motion": 59.25, "chance_1": 1.46, "chance_5": 7.12, "clips": 200,
        "index_seconds": 1.59, "same_index_after_a_kill": True, "hardware": "a CPU", "threads": 2,
        "torch": "2.13.0", "tokenmix_ops": "0.1.0", "commit": "abc", "date": "2026-11-23",
    }  # fmt: skip
    table = TABLES["search"]([row, {**row, "rerank": 20, "top_1": 54.75}])
    assert "| token_mixing-F | no | 50.0 | 98.5 | 100.0 | 99.0 | 59.2 |" in table
    assert "| token_mixing-F | 20 | 54.8 |" in table
    assert "the same to the last bit" in table
    assert "NOT the same" in TABLES["search"]([row, {**row, "same_index_after_a_kill": False}])
