"""PyTorch operators: schemas, fake implementations, FLOP formulas, autograd.

Each backend with its own kernels registers two operators, ``<backend>_fwd`` and ``<backend>_bwd``,
in ``torch.ops.tokenmix_ops``. They take the fields of a plan one by one, because an operator
accepts only tensors and numbers. `attention` joins the two under autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenmix_ops.plan import Plan

NAMESPACE = "tokenmix_ops"
_PLAN = (
    "int? row_dim, int num_tokens, int num_prefix_tokens, int? num_full_tokens, "
    "float cross_frame_gain, float scale"
)
"""row_dim: the dimension of query that selects the row of key_index, 1 (frames) or 2 (tokens); None
if one row serves the whole video."""
FORWARD = (
    f"(Tensor query, Tensor key, Tensor value, Tensor key_index, Tensor key_frame, {_PLAN}) -> "
    "(Tensor output, Tensor lse)"
)
"""output is contiguous and has the shape of query. lse, float32 [batch, num_heads, num_frames,
num_queries], is the base-2 logarithm of the sum of each query's exponentiated logits."""
BACKWARD = (
    "(Tensor output_grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
    "Tensor key_index, Tensor key_frame, Tensor token_order, Tensor use_start, Tensor uses, "
    f"{_PLAN}) -> (Tensor query_grad, Tensor key_grad, Tensor value_grad)"
)
"""Gradients have the shapes of query, key and value. query_grad is contiguous; the others have the
strides of key and value if these are dense. Tokens that no slot names get exactly zero. The inverse
tables (`Plan.token_order` and on) are empty where the plan has none."""

ROW_DIM = {"shared": None, "frame": 1, "token": 2}
"""row_dim of `Plan.rows`."""

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(
    backend: str,
    forward: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    keys: tuple[str, ...] = ("CPU", "CUDA"),
) -> None:
    """Defines a backend's two operators, implemented by ``forward`` and ``backward`` if given, for
    the dispatch keys ``keys``.

    A backend with compiled kernels registers its own implementations.
    """
    parts = (
        (f"{backend}_fwd", FORWARD, forward, _forward_fake, _forward_flops),
        (f"{backend}_bwd", BACKWARD, backward, _backward_fake, _backward_flops),
    )
    for name, schema, implementation, fake, flops in parts:
        _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        if implementation is not None:
            for key in keys:
                _library.impl(name, implementation, key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        register_flop_formula(getattr(torch.ops.tokenmix_ops, name))(flops)


def attention(
    backend: str, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float
) -> Tensor:
    """Computes token-mixing attention by a backend's operators; differentiable once.

    Expects shapes that `tokenmix_ops.token_mix_attention` has validated.
    """
    numbers = numbers_of(plan, scale)
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        if torch.compiler.is_compiling():
            # Dynamo refuses to pass one tensor twice to an autograd function.
            query, key, value = (tensor.view_as(tensor) for tensor in (query, key, value))
        tables = (plan.key_index, plan.key_frame, plan.token_order, plan.use_start, plan.uses)
        return _Attention.apply(backend, query, key, value, *tables, *numbers)
    return _operator(backend, "fwd")(query, key, value, plan.key_index, plan.key_frame, *numbers)[0]


def numbers_of(plan: Plan, scale: float) -> tuple[Any, ...]:
    """Returns the arguments of an operator that follow its tables."""
    gain = plan.cross_frame_gain if plan.scales_logits else 1.0
    tokens = (plan.num_tokens, plan.num_prefix_tokens, plan.num_full_tokens)
    return (ROW_DIM[plan.rows], *tokens, gain, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_index: Tensor,
        key_frame: Tensor,
        token_order: Tensor,
        use_start: Tensor,
        uses: Tensor,
        *numbers: Any,
    ) -> Tensor:
        output, lse = _operator(backend, "fwd")(query, key, value, key_index, key_frame, *numbers)
        tables = (key_index, key_frame, token_order, use_start, uses)
        ctx.save_for_backward(query, key, value, output, lse, *tables)
        ctx.backend, ctx.numbers = backend, numbers
        return output

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"backend {ctx.backend!r} supports first derivatives only; for higher ones "
                "(create_graph=True), use backend='eager' inside "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            )
        grads = _operator(ctx.backend, "bwd")(output_grad, *ctx.saved_tensors, *ctx.numbers)
        return (None, *grads, *[None] * (5 + len(ctx.numbers)))


def _operator(backend: str, direction: str) -> Any:
    return getattr(torch.ops.tokenmix_ops, f"{backend}_{direction}").default


def empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates the three gradients with the strides that `BACKWARD` promises."""
    key_grad, value_grad = torch.empty_like(key), torch.empty_like(value)
    # If the elements of key overlap in memory, empty_like may choose any strides.
    if key_grad.stride(-1) != 1:
        key_grad = key.new_empty(key.shape)
    if value_grad.stride(-1) != 1:
        value_grad = value.new_empty(value.shape)
    return query.new_empty(query.shape), key_grad, value_grad


def empty_output(query: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates output and lse as `FORWARD` promises them."""
    batch, num_frames, num_queries, num_heads, _ = query.shape
    lse = query.new_empty((batch, num_heads, num_frames, num_queries), dtype=torch.float32)
    return query.new_empty(query.shape), lse


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return empty_output(query)


def _backward_fake(
    output_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return empty_gradients(query, key, value)


def _products(query_shape: Any, key_index_shape: Any) -> int:
    """FLOPs of one product of all queries with their keys."""
    batch, num_frames, num_queries, num_heads, head_dim = query_shape
    return 2 * batch * num_frames * num_queries * num_heads * head_dim * key_index_shape[1]


def _forward_flops(query: Any, key: Any, value: Any, key_index: Any, *rest: Any, **_: Any) -> int:
    return 2 * _products(query, key_index)


def _backward_flops(
    output_grad: Any, query: Any, key: Any, value: Any, output: Any, lse: Any, key_index: Any,
    *rest: Any, **_: Any
) -> int:  # fmt: skip
    # Recomputes the logits, then one product each for dV, dP, dQ and dK.
    return 5 * _products(query, key_index)
