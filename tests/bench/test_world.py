"""The experiment on the small world: its reading of captions, its rows, and its table."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("av")
pytest.importorskip("pycocoevalcap")
from rich.console import Console

from bench import world
from bench.__main__ import main
from bench.rows import read_rows
from bench.tables import TABLES
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
    asked = ("world", "--work", str(tmp_path / "runs"), "--results", str(tmp_path))
    asked += ("--clips", "20", "--stills", "20", "--still-epochs", "1", "--epochs", "1")
    main([*asked, "--contenders", "spatial (P)"])
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
    main([*asked, "--contenders", "spatial (P)", "--tasks", "captioning"])
    assert len(read_rows(tmp_path / "world-cpu.jsonl")) == 4
    with pytest.raises(ValueError, match="'magic' is no contender; there are token_mixing"):
        next(world.measure(tmp_path, small, ("magic",), ("captioning",), Console()))
