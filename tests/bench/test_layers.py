"""Layers become rows, and a wrong one is not timed."""

import pytest
import torch

from bench import layers, passes
from bench.layers import CheckedLayers, layer_rows
from bench.passes import PASSES
from tokenmix_ops.peer_layers import LAYER_TITLES
from tokenmix_ops.timing import HostClock


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(passes, "FEWEST_ROUNDS", 2)
    monkeypatch.setattr(passes, "MOST_ROUNDS", 2)


SIZES = {"num_frames": 4, "num_tokens": 10, "num_heads": 2, "dim": 16}


def test_layers_become_rows(hasty):
    shape = {"batch": 2, **SIZES, "dtype": torch.float32, "backend": "eager"}
    rows = layer_rows(HostClock(), "cpu", 0.0, **shape, with_eager=True)
    assert {row["pass"] for row in rows} == set(PASSES[:2])
    assert {row["contender"] for row in rows} == LAYER_TITLES.keys()
    assert all(len(row["rounds_ms"]) == 2 for row in rows)
    rows = layer_rows(HostClock(), "cpu", 0.0, **shape, rounds=3)
    assert all(len(row["rounds_ms"]) == 3 for row in rows)


def test_layers_of_a_kernel_beyond_the_tolerance_are_not_timed(monkeypatch):
    real = layers.token_mix_attention
    monkeypatch.setattr(layers, "token_mix_attention", lambda *a, **k: 1.0001 * real(*a, **k))
    found = CheckedLayers(*SIZES.values(), "cpu", torch.float32, "eager")
    assert found.reasons.keys() == {"token_mixing", "token_mixing_gain_off"}
    assert all("wrong: output: " in why for why in found.reasons.values())
    assert found.contenders(1).keys() == found.layers.keys() - found.reasons.keys()


def test_a_layer_with_a_wrong_gradient_of_a_parameter_is_not_timed(monkeypatch):
    real = layers.layers_on

    def doubled(*arguments):
        weights, found = arguments[0], real(*arguments)
        plain, bias = found["spatial_sdpa"], weights.proj.bias
        if bias.dtype == torch.float32:
            found["spatial_sdpa"] = lambda tokens: plain(tokens) + (bias - bias.detach())
        return found

    monkeypatch.setattr(layers, "layers_on", doubled)
    found = CheckedLayers(*SIZES.values(), "cpu", torch.float32, "eager")
    assert found.reasons.keys() == {"spatial_sdpa"}
    assert found.reasons["spatial_sdpa"].startswith("wrong: the proj.bias gradient has")
