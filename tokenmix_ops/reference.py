"""The oracle: token-mixing attention straight from its definition, in plain PyTorch, in any dtype.

Deliberately slow and memory-hungry. Tests and benchmarks compare with it; no backend imports it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmix_ops.plan import Plan


def token_mix_attention_ref(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float | None = None
) -> Tensor:
    """[batch, num_frames, num_tokens, num_heads, head_dim] in and out, in the inputs' dtype."""
    num_frames, num_tokens, head_dim = query.shape[1], query.shape[2], query.shape[4]
    scale = head_dim**-0.5 if scale is None else scale
    output = torch.empty_like(query)
    for t in range(num_frames):
        for s in range(num_tokens):
            row = {"shared": 0, "frame": t, "token": s}[plan.rows]
            index, frame = plan.key_index[row].long(), plan.key_frame[row]
            cross = (frame != t) & (frame != -1)
            gain = torch.ones_like(frame, dtype=query.dtype)
            gain = gain.masked_fill(cross, plan.cross_frame_gain)
            k, v = key.flatten(1, 2)[:, index], value.flatten(1, 2)[:, index]
            logits = scale * gain * torch.einsum("bhd,bjhd->bhj", query[:, t, s], k)
            output[:, t, s] = torch.einsum("bhj,bjhd->bhd", logits.softmax(-1), v)
    return output
