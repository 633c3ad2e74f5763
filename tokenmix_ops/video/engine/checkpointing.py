"""Gradient checkpointing of transformers' layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_layers(model: nn.Module) -> None:
    """Has every layer compute its activations again in the backward pass.

    Not reentrant, so that frozen inputs, dropout and several processes work. Layers without a
    trainable parameter below or in them keep nothing either way. A layer that is checkpointed
    already stays as it is. Raises ValueError if the model has no layer that can.
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
        if not isinstance(layer.forward, _Checkpointed):
            layer.forward = _Checkpointed(layer, layer.forward)


class _Checkpointed:
    """Runs a layer's forward, again in the backward pass if the layer trains.

    A layer that trains gets no cache, as in transformers: the second run would add to it.
    """

    def __init__(self, layer: nn.Module, forward: Any) -> None:
        self.layer, self.forward = layer, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.layer.training or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        args = tuple(None if isinstance(value, Cache) else value for value in args)
        kwargs = {n: None if isinstance(value, Cache) else value for n, value in kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
