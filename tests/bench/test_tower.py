"""Whole towers become rows, and a wrong one is not timed."""

import pytest
import torch

pytest.importorskip("transformers")

from bench import tower
from bench.tables.speed import tower_table
from bench.titles import TOWERS
from bench.tower import NUM_FRAMES, conversions, parts
from tokenmix_ops.backends import cpu
from tokenmix_ops.modules import TokenMixing
from tokenmix_ops.timing import HostClock, environment

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32}


def rows_of(batches=(1,), rounds=2):
    found = parts(HostClock(), "cpu", batches, rounds, **SMALL)
    return [{**row, **environment()} for _, part in found for row in part()]


@pytest.mark.interfaces
def test_towers_become_rows_and_a_table():
    rows = rows_of(batches=(1, 2))
    assert [row["contender"] for row in rows] == 2 * list(TOWERS)
    by_name = {(row["shape"], row["contender"]): row for row in rows}
    for shape in ("B = 1", "B = 2"):
        assert len(by_name[shape, "transformers"]["rounds_ms"]) == 2
        assert len(by_name[shape, "converted_eager"]["rounds_ms"]) == 2
        ours = by_name[shape, "converted"]
        if cpu.unavailable():
            assert cpu.unavailable() in ours["reason"]
        else:
            assert ours["relative_error"]["output"] < 1e-5
    table = tower_table(rows)
    assert "| transformers' own | " in table
    assert "B videos of 8 frames at 32 pixels, float32" in table


def test_a_tower_that_computes_something_else_is_not_timed(monkeypatch):
    real = tower.mix_tokens

    def forgetful(model, num_frames, mixing, layers, backend):
        if mixing == "released" and next(model.parameters()).dtype == torch.float32:
            mixing = "spatial"
        return real(model, num_frames, mixing, layers, backend="eager")

    monkeypatch.setattr(tower, "mix_tokens", forgetful)
    reasons = {row["contender"]: row.get("reason") for row in rows_of()}
    for name in ("last_mixes", "converted_eager", "converted"):
        assert reasons[name].startswith("wrong: the output has a relative error of")
    assert reasons["transformers"] is reasons["all_spatial"] is None


def test_a_conversion_shares_parameters_and_leaves_the_original_alone():
    from transformers import BlipVisionModel

    from tokenmix_ops.video.blip import blip_vision_config

    own = BlipVisionModel(blip_vision_config("vit-b16", **SMALL))
    conversion, _ = conversions(3, "cpu")["converted"]
    found = tower.converted(own, conversion, "eager")
    assert [id(p) for p in found.parameters()] == [id(p) for p in own.parameters()]
    layers = [m for m in found.modules() if isinstance(m, TokenMixing)]
    assert [m.mixing.kind for m in layers] == ["spatial", "spatial", "released"]
    assert {m.num_frames for m in layers} == {NUM_FRAMES}
    assert not any(isinstance(m, TokenMixing) for m in own.modules())
