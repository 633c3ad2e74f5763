"""What a training needs to go on as if it had never stopped, as whole tensors by name.

The same whether parameters are on one device, copied or divided. PyTorch's own
``distributed.checkpoint.state_dict`` is not used: it refuses, or invents, the optimiser's state
of a parameter that has had no gradient yet, and leaves out momentum copies with the frozen rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tokenmix_ops.video.engine.placement import fill, gathered


def changing(model: nn.Module, kept: Iterable[str]) -> dict[str, Tensor]:
    """Parameters that are trained or kept, and persistent buffers, each once, by name.

    Raises ValueError if ``kept`` names what the model lacks.
    """
    values = model.state_dict(keep_vars=True)
    kept = set(kept)
    if unknown := sorted(kept - values.keys()):
        raise ValueError(f"the task keeps {unknown[0]!r}, which its model does not have")
    chosen: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in values.items():
        moves = not isinstance(value, nn.Parameter) or value.requires_grad or name in kept
        if isinstance(value, Tensor) and moves and id(value) not in seen:
            chosen[name] = value
            seen.add(id(value))
    return chosen


def collect(
    model: nn.Module, optimizer: Optimizer, kept: Iterable[str], keep: bool
) -> dict[str, Any]:
    """The model's and the optimiser's state on the CPU; empty where not ``keep``.

    All processes call it. Raises ValueError if a weight is not finite, so that a saved
    state is always one to go on from.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in changing(model, kept).items():
        whole = gathered(value)
        if isinstance(value, nn.Parameter) and not bool(whole.isfinite().all()):
            raise ValueError(
                f"{name} has values that are not finite, so the state is not saved: lower "
                "learning_rate, or set max_grad_norm"
            )
        if keep:
            weights[name] = whole.cpu()
        for key, moment in optimizer.state.get(value, {}).items():
            whole = gathered(moment)
            if keep:
                moments.setdefault(name, {})[key] = whole.cpu()
    return {"model": weights, "optimizer": moments}


def compare(model: nn.Module, kept: Iterable[str], saved: Mapping[str, Any]) -> None:
    """Raises ValueError if the names or shapes of a model and of a saved state differ."""
    values = changing(model, kept)
    stored = saved["model"]
    for name in sorted(values.keys() | stored.keys()):
        here = tuple(values[name].shape) if name in values else None
        there = tuple(stored[name].shape) if name in stored else None
        if here != there:
            raise ValueError(
                f"the saved state is another model's: {name} is "
                f"{there or 'not there'} in it and {here or 'not there'} in this one"
            )


def put_back(
    model: nn.Module, optimizer: Optimizer, kept: Iterable[str], saved: Mapping[str, Any]
) -> None:
    """Gives a model and its optimiser the state that ``collect`` gave; `compare` them before.

    All processes call it.
    """
    for name, value in changing(model, kept).items():
        fill(value, saved["model"][name])
        if name in saved["optimizer"]:
            optimizer.state[value] = {
                # AdamW counts steps on the CPU; its other moments are where the parameter is.
                key: moment.clone() if key == "step" else _like(value, moment)
                for key, moment in saved["optimizer"][name].items()
            }


def _like(value: Tensor, moment: Tensor) -> Tensor:
    placed = torch.zeros_like(value, requires_grad=False)
    fill(placed, moment)
    return placed
