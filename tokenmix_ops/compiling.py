"""What torch.compile is told about this project's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Number = TypeVar("Number", int, float)
F = TypeVar("F", bound=Callable[..., object])


def constant(function: F) -> F:
    """Marks a function of plain values whose result torch.compile may take as a constant.

    What torch.compiler.assume_constant_result does, without importing the compiler for it, which
    would double the time of ``import tokenmix_ops``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def guarded(number: Number) -> Number:
    """The number itself, also where the compiler made it symbolic: the graph is for this value."""
    if not torch.compiler.is_compiling():
        return number
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(number)  # type: ignore[return-value]
