"""The authors' way computes the same."""

import pytest
import torch

from bench.tables.tuning import (
    TOKEN_MIXING,
)

pytest.importorskip("transformers")
from bench.published import as_published
from bench.training import Run, Size, Training, build

WIDTH = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


TINY = Size(
    batch=2,
    num_frames=3,
    image_size=32,
    length=6,
    vision={**WIDTH, "num_hidden_layers": 4, "patch_size": 8},
    text={**WIDTH, "intermediate_size": 64, "vocab_size": 110, "encoder_hidden_size": 32},
)


def loss_and_gradients(model, batch):
    loss = model(*batch)
    updated = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, updated, materialize_grads=True)]


@pytest.mark.interfaces
@pytest.mark.parametrize("name", [TOKEN_MIXING, "full", "dual_attention", "st_adapter", "bitfit"])
def test_the_authors_way_computes_the_same(name):
    torch.manual_seed(0)
    run = Run(name, torch.float32)
    model = build(run, TINY)
    batch = Training(model, run, TINY).batch
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    ours = loss_and_gradients(model, batch)
    parameters = list(model.parameters())
    theirs = loss_and_gradients(as_published(model), batch)
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    assert not any("Converted" in type(m).__name__ for m in model.modules())
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6


def test_a_mixing_that_was_not_published_is_refused():
    model = build(Run("spatial (P)", torch.float32), TINY)
    model.encoder.layers[0].self_attn.mixing = type(
        model.encoder.layers[0].self_attn.mixing
    ).joint()
    with pytest.raises(ValueError, match="published no way to compute"):
        as_published(model)
