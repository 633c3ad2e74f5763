"""Layers that are compared compute the same, on the same weights."""

import pytest
import torch

from tokenmix_ops.backends import cpu
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.modules import TokenMixAttention
from tokenmix_ops.peer_layers import (
    LAYER_TITLES,
    NaiveGather,
    SpatialSDPA,
    about_backend,
    blip_layer,
    blip_sized_layers,
    layers_on,
    mixing_layer,
)


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return TokenMixAttention(32, 4, 4, dtype=torch.float64)


@pytest.fixture
def tokens():
    return torch.randn(8, 18, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.interfaces
def test_contenders_of_one_kind_compute_the_same(weights, tokens):
    spatial = mixing_layer(weights, Mixing.spatial())(tokens)
    assert torch.allclose(SpatialSDPA(weights)(tokens), spatial, atol=1e-12)
    assert torch.allclose(blip_layer(weights, 32)(tokens), spatial, atol=1e-12)
    for gain in (0.8, 1.0):
        mixed = mixing_layer(weights, Mixing.released(cross_frame_gain=gain))(tokens)
        # Its logits are float32, as published.
        assert torch.allclose(NaiveGather(weights, gain)(tokens), mixed, atol=1e-5)
    assert not torch.allclose(mixed, spatial, atol=1e-2)


def test_all_contenders_share_their_weights():
    layers = layers_on(TokenMixAttention(32, 4, 4), with_eager=True)
    assert list(layers) == list(LAYER_TITLES)
    tokens = torch.randn(4, 18, 32)
    layers["token_mixing"](tokens).sum().backward()
    assert layers["naive_gather"].qkv.weight.grad is not None


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_layers_run_on_the_kernel_where_it_is_the_default_and_eager_ones_stand_beside_them():
    if len(cpu.instruction_sets()[1]) == 1:
        pytest.skip("this processor has portable vectors alone")
    assert list(blip_sized_layers()) == list(LAYER_TITLES)
    assert about_backend().startswith("Token mixing runs on the C++ kernel for CPUs (")


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "no compiler was found")
    assert not any(name.startswith("eager_") for name in blip_sized_layers())
    assert about_backend() == (
        "Token mixing runs on the backend 'eager', not on the C++ kernel: no compiler was found."
    )
