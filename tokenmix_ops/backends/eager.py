"""Token-mixing attention in plain PyTorch: select the keys, then scaled_dot_product_attention.

Runs wherever PyTorch does and supports the same transforms as PyTorch's own attention. Queries of
all frames that share a key set are batched, so keys are copied per frame only if the mixing or the
gain requires it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenmix_ops.plan import Plan, Rows

name = "eager"


def unavailable() -> str | None:
    """Why this machine cannot run the backend; None if it can."""
    return None


def unsupported(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    """Why the backend cannot compute this call; None if it can."""
    return None


def not_preferred(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    """Why the automatic choice skips the backend for a call that it can compute; None if not."""
    return None


def token_mix_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float
) -> Tensor:
    """Expects arguments that `tokenmix_ops.token_mix_attention` has validated."""
    if plan.rows == "token" and plan.scales_logits:
        # The gain differs between queries of a row, so it cannot be folded into the keys.
        num_queries = query.shape[2]
        weights = _weights(query, key, plan, scale)
        mixed = torch.einsum(
            "brhlm,brmhd->brlhd", weights.to(value.dtype), _select(value, plan, num_queries)
        )
        return _ungroup(mixed, "token", query)

    keys = _select(key, plan, query.shape[2])
    values = _select(value, plan, query.shape[2])
    rows = plan.rows
    if plan.scales_logits:
        # Folds the gain of (query frame, key) into one copy of the keys per query frame.
        rows = "frame"
        gained = keys * plan.cross_frame_gain
        keys = torch.where(plan.is_cross_frame[..., None, None], gained, keys)
        values = values.expand(-1, plan.num_frames, -1, -1, -1)
    queries = _group(query, rows)
    num_rows = queries.shape[1]
    output = scaled_dot_product_attention(
        queries.flatten(0, 1).transpose(1, 2),
        keys.flatten(0, 1).transpose(1, 2),
        values.flatten(0, 1).transpose(1, 2),
        scale=scale,
    )
    output = output.transpose(1, 2)
    return _ungroup(output.reshape(-1, num_rows, *output.shape[1:]), rows, query)


def attention_weights(query: Tensor, key: Tensor, plan: Plan, scale: float) -> Tensor:
    """softmax(logits) [batch, num_frames, num_heads, num_queries, num_keys], at least float32."""
    weights = _weights(query, key, plan, scale)
    num_frames, num_queries = query.shape[1], query.shape[2]
    if plan.rows == "shared":
        return weights.squeeze(1).unflatten(2, (num_frames, num_queries)).movedim(2, 1)
    if plan.rows == "token":
        return weights.transpose(1, 3)
    return weights


def _weights(query: Tensor, key: Tensor, plan: Plan, scale: float) -> Tensor:
    """softmax(logits) [batch, num_rows, num_heads, queries of a row, num_keys]."""
    num_queries = query.shape[2]
    at_least_float32 = torch.promote_types(query.dtype, torch.float32)
    keys = _select(key, plan, num_queries).to(at_least_float32)
    queries = _group(query, plan.rows).to(at_least_float32)
    logits = torch.einsum("brlhd,brmhd->brhlm", queries, keys) * scale
    if plan.scales_logits:
        cross = plan.is_cross_frame
        if plan.rows == "shared":
            cross = cross.repeat_interleave(num_queries, dim=0)
        elif plan.rows == "frame":
            cross = cross[:, None, None, :]
        else:
            cross = cross[:num_queries, None]
        logits = torch.where(cross, logits * plan.cross_frame_gain, logits)
    return logits.softmax(-1)


def _group(tokens: Tensor, rows: Rows) -> Tensor:
    """Maps [batch, num_frames, num_tokens, ...] to [batch, num_rows, tokens per row, ...]."""
    if rows == "shared":
        return tokens.flatten(1, 2).unsqueeze(1)
    return tokens if rows == "frame" else tokens.transpose(1, 2)


def _ungroup(grouped: Tensor, rows: Rows, query: Tensor) -> Tensor:
    """Inverts `_group`, restoring the shape of ``query``."""
    if rows == "shared":
        return grouped.squeeze(1).unflatten(1, query.shape[1:3])
    return grouped if rows == "frame" else grouped.transpose(1, 2)


def _select(tokens: Tensor, plan: Plan, num_queries: int) -> Tensor:
    """Selects the keys [batch, num_rows, num_keys, num_heads, head_dim], as views if possible."""
    if tokens.dim() == 4:
        return tokens.unsqueeze(1)
    by_token = plan.rows == "token"
    if plan.own_tokens:
        grouped = _group(tokens, plan.rows)
        return grouped[:, :num_queries] if by_token else grouped
    # Indexing reads strided rows directly; index_select would first make the view contiguous.
    return tokens.flatten(1, 2)[:, plan.key_index[:num_queries] if by_token else plan.key_index]
