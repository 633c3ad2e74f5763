"""Every private name of PyTorch that the attention core needs, once.

docs/interfaces.md says which test notices when one of them changes.
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
"""What a module keeps of the hooks on its calls."""


def constant(function: F) -> F:
    """Marks a function of plain values whose result torch.compile may take as a constant.

    What torch.compiler.assume_constant_result does, without importing the compiler for it, which
    would double the time of ``import tokenmix_ops``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def cached_constant(function: F) -> F:
    """A `constant` function that also remembers its results; ``cache_clear`` forgets them.

    ``constant(lru_cache(function))`` would not do: torch.compile traces into a cached function.
    """
    cached = lru_cache(function)

    @wraps(function)
    def remembered(*arguments: Any) -> Any:
        return cached(*arguments)

    remembered.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return constant(remembered)  # type: ignore[return-value]


def guarded(number: Number) -> Number:
    """The number itself, also where the compiler made it symbolic: the graph is for this value."""
    if not torch.compiler.is_compiling():
        return number
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(number)  # type: ignore[return-value]


def in_transform() -> bool:
    """Whether a transform of torch.func runs."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_trace_or_transform() -> bool:
    """Whether a tensor made now belongs to a trace or a transform, and must not be kept."""
    return _get_current_dispatch_mode() is not None or in_transform()


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor is one of vmap's, whose strides are those of no tensor in memory."""
    return torch._C._functorch.is_batchedtensor(tensor)


def have_tangent(*tensors: Tensor) -> bool:
    """Whether forward-mode derivatives are asked for of a tensor."""
    # Inside a level of forward-mode derivatives alone can a tensor have a tangent.
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def is_plain_linear(module: Any) -> bool:
    """Whether reading the weight gives what calling the module would."""
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
    """The children, parameters and buffers of a module itself, those that are None too."""
    return module._modules, module._parameters, module._buffers


def follow(module: nn.Module, original: nn.Module) -> None:
    """Has the hooks on ``original`` fire for ``module``, also those to come, and the state dict
    leave out what it leaves out there."""
    for name in HOOKS:
        vars(module)[name] = vars(original)[name]
    module._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
