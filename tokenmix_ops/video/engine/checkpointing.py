"""Gradient checkpointing of transformers' layers."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_layers(model: nn.Module) -> None:
    """Has every layer compute its activations again in the backward pass.

    Not reentrant, so that frozen inputs, dropout and several processes work. Layers without a
    trainable parameter below or in them keep nothing either way. Raises ValueError if the model
    has no layer that can.
    """
    layers: list[Any] = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise ValueError(
            "gradient_checkpointing: the model has no transformers layer that supports it; leave "
            "it off"
        )
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = True
