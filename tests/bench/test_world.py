"""The experiment on the small world: its reading of captions, its rows, and its table."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("tyro")
pytest.importorskip("pycocoevalcap")
from rich.console import Console

from tokenmix_ops.bench import world
from tokenmix_ops.bench.render import TABLES, read_rows
from tokenmix_ops.video.data.shapes import MOTIONS, sample_scenes


def test_motions_are_read_from_both_ways_of_saying_them():
    scenes = sample_scenes(40, 8, torch.Generator().manual_seed(0))
    for index in range(40):
        for caption in scenes.captions(index):
            assert world.motion_of(caption) == MOTIONS[scenes.motion[index]]
        for caption in scenes.still_captions(index):
            assert world.motion_of(caption) is None


def test_rows_come_out_and_go_on_where_they_stopped(tmp_path, monkeypatch):
    small = world.World(clips=20, stills=20, still_epochs=1, epochs=1)
    asked = {"world": small, "out": tmp_path / "runs", "results": tmp_path}
    world.main(contenders=("spatial (P)",), **asked)
    rows = read_rows(tmp_path / "world-cpu.jsonl")
    assert [(row["task"], row["contender"]) for row in rows] == [
        (task, name)
        for task in ("captioning", "retrieval")
        for name in ("nothing yet", "spatial (P)")
    ]
    for row in rows:
        figures = [row[name] for name in ("motion", "order", "R@1", "BLEU-4") if name in row]
        assert len(figures) == 2
        assert all(0 <= figure <= 100 for figure in figures)
    table = TABLES["world"](rows)
    assert "| captioning, tuned by | motion | BLEU-4 | CIDEr | epochs | rate | minutes |" in table
    assert table.count("spatial (P)") == 2

    def fail(*_, **__):
        raise AssertionError("trained again")

    # What is finished is not done again, and rows of others stay.
    monkeypatch.setattr("tokenmix_ops.video.engine.loop._Run.run", fail)
    world.main(contenders=("spatial (P)",), tasks=("captioning",), **asked)
    assert len(read_rows(tmp_path / "world-cpu.jsonl")) == 4
    with pytest.raises(ValueError, match="'magic' is no contender; there are token_mixing"):
        next(world.measure(tmp_path, small, ("magic",), ("captioning",), Console()))
