"""Every private PyTorch name that the attention core uses, each in one place.

A test in tests/test_torch_internals.py fails when one of them changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode, is_traceable_wrapper_subclass

Number = TypeVar("Number", int, float)
F = TypeVar("F", bound=Callable[..., object])

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
"""Attributes in which a module stores the hooks on its calls."""


def constant(function: F) -> F:
    """Marks a function of plain values whose result torch.compile may treat as a constant.

    Does the same as torch.compiler.assume_constant_result without importing the compiler, which
    would double the time of ``import tokenmix_ops``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def cached_constant(function: F) -> F:
    """Marks a function as `constant` and caches its results; ``cache_clear`` drops them.

    ``constant(lru_cache(function))`` would not work: torch.compile traces into a cached function.
    """
    cached = lru_cache(function)

    @wraps(function)
    def remembered(*arguments: Any) -> Any:
        return cached(*arguments)

    remembered.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return constant(remembered)  # type: ignore[return-value]


def guarded(number: Number) -> Number:
    """Returns a plain number. If torch.compile made it symbolic, specialises the graph to it."""
    if not torch.compiler.is_compiling():
        return number
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(number)  # type: ignore[return-value]


@cached_constant
def autocast_is_available(device_type: str) -> bool:
    """Whether PyTorch has autocast for a type of device. torch.compile traces it from 2.12 on."""
    return torch.amp.is_autocast_available(device_type)


@cached_constant
def has_tiles() -> bool:
    """Whether the processor has AMX, by which PyTorch's own attention multiplies bfloat16."""
    return torch.cpu._is_amx_tile_supported()


def in_transform() -> bool:
    """Whether a transform of torch.func is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_trace_or_transform() -> bool:
    """Whether a tensor created now belongs to a trace or a transform, and must not be cached."""
    return _get_current_dispatch_mode() is not None or in_transform()


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor is batched by vmap, so that its strides do not describe memory."""
    return torch._C._functorch.is_batchedtensor(tensor)


def have_tangent(*tensors: Tensor) -> bool:
    """Whether any of the tensors has a forward-mode tangent."""
    # A tensor can only have a tangent inside a forward-mode level.
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def is_plain_linear(module: Any) -> bool:
    """Whether using the weight directly is equivalent to calling the module."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        nn.modules.module._global_forward_hooks,
        nn.modules.module._global_forward_pre_hooks,
        nn.modules.module._global_backward_hooks,
        nn.modules.module._global_backward_pre_hooks,
    )
    return (
        type(module) is nn.Linear
        and not any(hooks)
        and "forward" not in vars(module)
        and not is_traceable_wrapper_subclass(module.weight)
    )


def parts(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Returns a module's own children, parameters and buffers, including those that are None."""
    return module._modules, module._parameters, module._buffers


def follow(module: nn.Module, original: nn.Module) -> None:
    """Shares the hooks of ``original``, current and future, with ``module``, and copies which
    buffers are left out of the state dict."""
    for name in HOOKS:
        vars(module)[name] = vars(original)[name]
    module._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
