"""Gradient checkpointing of transformers' layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_layers(model: nn.Module) -> None:
    """Has every layer compute its activations again in the backward pass.

    Not reentrant, so that frozen inputs, dropout and several processes work. Layers without a
    trainable parameter below or in them keep nothing either way. Raises ValueError if the model
    has no layer that can.
    """
    # By PyTorch's own means: transformers has renamed its switch, which besides has inputs of
    # frozen layers require gradients.
    layers: list[Any] = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise ValueError(
            "gradient_checkpointing: the model has no transformers layer that supports it; leave "
            "it off"
        )
    for layer in layers:
        layer.forward = partial(_forward, layer.forward)


def _forward(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not forward.__self__.training or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
