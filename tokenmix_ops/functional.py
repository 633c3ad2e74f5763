"""The functional API: validates a call, compiles its plan, and dispatches it to a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenmix_ops import backends
from tokenmix_ops.backends import Backend, Explanation, eager
from tokenmix_ops.mixing import Mixing, plan_of
from tokenmix_ops.plan import Plan
from tokenmix_ops.torch_internals import (
    autocast_is_available,
    in_forward_mode,
    in_jit_trace,
    in_trace_or_transform,
    is_batched,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def token_mix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mixing: Mixing | Plan | str,
    num_prefix_tokens: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every frame's queries to the keys that a mixing draws from all frames.

    Args:
        query: [batch, num_frames, num_queries, num_heads, head_dim]: the first num_queries tokens
            of each frame, usually all num_tokens.
        key, value: [batch, num_frames, num_tokens, num_heads, head_dim]; or, if all frames share
            one key set, only the selected tokens: [batch, num_keys, num_heads, head_dim], where
            num_tokens equals num_queries unless ``mixing`` is a plan.
        mixing: a mixing, its name (``"released"``), or a plan of it.
        num_prefix_tokens: number of leading tokens of a frame that are not patches; ignored if
            ``mixing`` is a plan.
        scale: factor of the logits; head_dim ** -0.5 if None.
        backend: name of a backend. None defers to `use_backend`, then TOKENMIX_BACKEND, then the
            automatic choice.

    Accepts any strides with a contiguous last dimension, in float16, bfloat16, float32 or float64.
    Returns a tensor of the shape of ``query``, empty for an empty batch. Raises ValueError for
    wrong shapes, strides, devices, dtypes or names, RuntimeError if the requested backend cannot
    compute the call. Source: Token Mixing (AAAI 2023), Eq. 8 and "Selection Strategy".
    """
    query, key, value = _autocast(query, key, value)
    plan, chosen = _prepared(query, key, value, mixing, num_prefix_tokens, backend)
    return chosen.token_mix_attention(query, key, value, plan, _scale(query, scale))


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    mixing: Mixing | Plan | str,
    num_prefix_tokens: int = 1,
    scale: float | None = None,
) -> Tensor:
    """Returns the softmax weights [batch, num_frames, num_heads, num_queries, num_keys].

    Takes the arguments of `token_mix_attention`; computes in float32 or better. For inspection: it
    materialises the whole map, which the operator itself never does.
    """
    query, key = _autocast(query, key)
    plan = _checked(query, key, key, mixing, num_prefix_tokens)
    return eager.attention_weights(query, key, plan, _scale(query, scale))


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Mixing | Plan | str,
    *,
    num_prefix_tokens: int = 1,
    backend: str | None = None,
) -> Explanation:
    """Says which backend `token_mix_attention` would use for this call, and why not the others."""
    query, key, value = _autocast(query, key, value)
    plan = _checked(query, key, value, mixing, num_prefix_tokens)
    return backends.explain(query, key, value, plan, backend)


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    # As autocast does for PyTorch's own attention: casts to lower precision, except float64.
    device_type = tensors[0].device.type
    if not autocast_is_available(device_type):
        return tensors
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.dtype in DTYPES[:3] else t for t in tensors)


MOST_REMEMBERED = 1024
_PLAIN = {Tensor, torch.nn.Parameter}
_remembered: dict[tuple[Any, ...], tuple[Plan, Backend]] = {}
"""Plan and backend of valid calls, by all that they depend on; emptied when it is full."""


def forget_calls() -> None:
    """For tests and benchmarks that change what backends say of themselves."""
    _remembered.clear()


def _prepared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Mixing | Plan | str,
    num_prefix_tokens: int,
    backend: str | None,
) -> tuple[Plan, Backend]:
    """Validates a call and returns its plan and the chosen backend."""
    if (
        torch.compiler.is_compiling()
        or in_trace_or_transform()
        or in_forward_mode()
        or in_jit_trace()
        or not {type(query), type(key), type(value)} <= _PLAIN
        or not isinstance(mixing, Mixing | Plan | str)
        or not isinstance(num_prefix_tokens, int)
    ):
        plan = _checked(query, key, value, mixing, num_prefix_tokens)
        return plan, backends.select(query, key, value, plan, backend)
    facts = (
        backends.request(backend),
        mixing,
        num_prefix_tokens,
        *(query.dtype, query.device, query.shape, query.stride()),
        *(key.dtype, key.device, key.shape, key.stride()),
        *(value.dtype, value.device, value.shape, value.stride()),
    )
    prepared = _remembered.get(facts)
    if prepared is None:
        plan = _checked(query, key, value, mixing, num_prefix_tokens)
        prepared = plan, backends.select(query, key, value, plan, backend)
        if len(_remembered) >= MOST_REMEMBERED:
            _remembered.clear()
        _remembered[facts] = prepared
    return prepared


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Mixing | Plan | str,
    num_prefix_tokens: int,
) -> Plan:
    """Validates a call and returns its plan; ValueError names the offending argument."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must have the dtype and device of query, {query.dtype} on {query.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if query.dim() != 5 or 0 in query.shape[1:]:
        raise ValueError(
            "query must be [batch, num_frames, num_queries, num_heads, head_dim], none but batch "
            f"of size 0, got {list(query.shape)}"
        )
    batch, num_frames, num_queries, num_heads, head_dim = query.shape
    selected = key.dim() == 4
    if isinstance(mixing, Plan):
        plan = mixing
        if plan.num_frames != num_frames or plan.num_tokens < num_queries:
            raise ValueError(
                f"query of {num_frames} frames with {num_queries} queries each does not fit a plan "
                f"of {plan.num_frames} frames of {plan.num_tokens} tokens"
            )
        if plan.key_index.device != query.device:
            plan = plan_of(
                plan.mixing, num_frames, plan.num_tokens, plan.num_prefix_tokens, query.device
            )
    else:
        num_tokens = key.shape[2] if key.dim() == 5 else num_queries
        plan = plan_of(mixing, num_frames, num_tokens, num_prefix_tokens, query.device)
        if num_queries > num_tokens:
            raise ValueError(
                f"query has {num_queries} queries a frame, but key only {num_tokens} tokens a frame"
            )
    if selected and plan.rows != "shared":
        raise ValueError(
            f"key is already selected (4 dimensions), but {plan.mixing!r} has no key set that all "
            "frames share; pass [batch, num_frames, num_tokens, num_heads, head_dim]"
        )
    if selected:
        wanted = [batch, plan.num_keys, num_heads, head_dim]
        names = "[batch, num_keys, num_heads, head_dim]"
    else:
        wanted = [batch, num_frames, plan.num_tokens, num_heads, head_dim]
        names = "[batch, num_frames, num_tokens, num_heads, head_dim]"
    for name, tensor in (("key", key), ("value", value)):
        if list(tensor.shape) != wanted:
            raise ValueError(f"{name} must be {names} = {wanted}, got {list(tensor.shape)}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        vmapped = not torch.compiler.is_compiling() and is_batched(tensor)
        if head_dim > 1 and tensor.stride(-1) != 1 and batch > 0 and not vmapped:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides "
                f"{list(tensor.stride())}; call .contiguous() on it"
            )
    return plan
