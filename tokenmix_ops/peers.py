"""What the operator is compared with: the naive gather, other libraries' attention.

Functions take query, key and value [batch, num_frames, num_tokens, num_heads, head_dim] and return
the shape of query; all but ``spatial_sdpa`` compute what a plan says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import tokenmix_ops as tm
from tokenmix_ops.plan import Plan

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SDPA_BY_FRAME = {f"{name}_by_frame": backend for name, backend in SDPA.items()}
ON_GPUS = (
    *(f"sdpa_{library}{way}" for library in ("cudnn", "efficient") for way in ("", "_by_frame")),
    *("cudnn_selected", "xformers", "flash_attn"),
)
"""Peers that a CPU has none of."""
SELECTED = ("triton_selected", "cpu_selected", "cudnn_selected")
"""Those that take key and value already selected, [batch, num_keys, num_heads, head_dim]."""
KERNELS = {"cuda": "triton", "cpu": "cpu"}
"""This project's backend with kernels of its own, by type of device."""

OPERATOR_TITLES = {
    "triton": "tokenmix_ops, Triton",
    "triton_selected": "tokenmix_ops, Triton, keys already selected",
    "cpu": "tokenmix_ops, C++",
    "cpu_selected": "tokenmix_ops, C++, keys already selected",
    "eager": "tokenmix_ops, eager",
    "naive_gather": "naive gather, as published",
    "sdpa_flash": "gather + SDPA, flash",
    "sdpa_cudnn": "gather + SDPA, cuDNN",
    "sdpa_efficient": "gather + SDPA, efficient",
    "sdpa_flash_by_frame": "gather + SDPA, flash, frame by frame",
    "sdpa_cudnn_by_frame": "gather + SDPA, cuDNN, frame by frame",
    "sdpa_efficient_by_frame": "gather + SDPA, efficient, frame by frame",
    "cudnn_selected": "SDPA, cuDNN, keys already selected",
    "flex": "gather + FlexAttention, compiled",
    "xformers": "gather + xformers",
    "flash_attn": "gather + flash-attn",
    "spatial_sdpa": "SDPA without any mixing",
}


def operators(
    plan: Plan, compiled: bool = True, kernel: str = "triton"
) -> dict[str, Attention | str]:
    """By name, in the order of `OPERATOR_TITLES`: a function, or the reason why there is none.

    ``kernel`` is one of `KERNELS`; beside that for CPUs, peers that know only GPUs are left out.

    Attention that knows no gain gets one set of scaled keys for each frame. With these, all frames
    go at once, for which the values are copied, or frame by frame, which takes more launches.

    ``compiled`` False leaves FlexAttention uncompiled, which is slow and for checks only. Whether
    this machine can run a function shows when it is called.
    """
    on_keys = _on_scaled if plan.scales_logits else _on_gathered
    per_frame = None if plan.rows == "shared" else "frames share no key set"
    found: dict[str, Attention | str] = {
        kernel: _tokenmix(kernel, plan),
        f"{kernel}_selected": per_frame or _tokenmix(kernel, plan),
        "eager": _tokenmix("eager", plan),
        "naive_gather": "published for the released mixing only",
    }
    if plan.mixing.kind == "released" and plan.num_prefix_tokens == 1:
        found["naive_gather"] = partial(naive_gather, gain=plan.cross_frame_gain)
    for name, backend in SDPA.items():
        found[name] = on_keys(partial(_sdpa, backend), plan)
    one_set = None if plan.scales_logits else "without a gain all frames go at once"
    for name, backend in SDPA_BY_FRAME.items():
        found[name] = per_frame or one_set or _by_frame(partial(_sdpa, backend), plan)
    cudnn = partial(_sdpa, SDPBackend.CUDNN_ATTENTION)
    found["cudnn_selected"] = per_frame or on_keys(cudnn, plan, selected=True)
    found["flex"] = _on_gathered(_flex(plan, compiled), plan)
    for name, package, peer in (
        ("xformers", "xformers", _xformers),
        ("flash_attn", "flash_attn", _flash_attn),
    ):
        missing = None if find_spec(package) else f"{package} is not installed"
        found[name] = missing or on_keys(peer, plan)
    found["spatial_sdpa"] = spatial_sdpa
    return {name: way for name, way in found.items() if kernel != "cpu" or name not in ON_GPUS}


def _tokenmix(backend: str, plan: Plan) -> Attention:
    return partial(tm.token_mix_attention, mixing=plan, backend=backend)


def naive_gather(query: Tensor, key: Tensor, value: Tensor, gain: float) -> Tensor:
    """The authors' published way: keys indexed, logits masked, in float32.

    At every call the index is rebuilt, and for a gain a mask as large as the logits [batch,
    num_heads, num_frames * num_tokens, num_keys]; keys lie grouped by frame, the prefix is [CLS].
    """
    num_frames, num_tokens, head_dim = query.shape[1], query.shape[2], query.shape[4]
    device = query.device
    query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    # Slices where they compared, which on a GPU would wait for every index.
    patches = torch.arange(num_tokens - 1, device=device)
    groups = [patches[source::num_frames] for source in range(num_frames)]
    index = [torch.arange(num_frames, device=device) * num_tokens]
    index += [source * num_tokens + 1 + group for source, group in enumerate(groups)]
    keys = torch.cat(index)
    logits = query.float() @ key[:, :, keys].float().transpose(-2, -1)
    logits = logits * head_dim**-0.5
    if gain != 1.0:
        unscaled = torch.zeros(logits.shape, device=device)
        unscaled[..., :num_frames] = 1
        start = num_frames
        for source, group in enumerate(groups):
            rows = slice(source * num_tokens, (source + 1) * num_tokens)
            unscaled[:, :, rows, start : start + len(group)] = 1
            start += len(group)
        logits = logits * (unscaled + (1 - unscaled) * gain)
    weights = logits.softmax(dim=-1).to(value.dtype)
    mixed = (weights @ value[:, :, keys]).transpose(1, 2)
    return mixed.unflatten(1, (num_frames, num_tokens))


def spatial_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain attention inside each frame: another function, for comparison."""
    of_frames = (t.flatten(0, 1) for t in (query, key, value))
    mixed = _heads_first(scaled_dot_product_attention)(*of_frames)
    return mixed.unflatten(0, query.shape[:2])


def _on_gathered(attend: Attention, plan: Plan, selected: bool = False) -> Attention:
    """Attention of tensors [.., queries or keys, num_heads, head_dim], on a plan's gathered keys.

    Frames that share keys go together; else each is a batch entry of its own.
    """
    shared = plan.rows == "shared"
    index = plan.key_index.flatten()

    def gathered(tokens: Tensor) -> Tensor:
        keys = tokens.flatten(1, 2).index_select(1, index)
        return keys if shared else keys.unflatten(1, plan.key_index.shape).flatten(0, 1)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not selected:
            key, value = gathered(key), gathered(value)
        mixed = attend(query.flatten(1, 2) if shared else query.flatten(0, 1), key, value)
        return mixed.unflatten(1 if shared else 0, query.shape[1:3] if shared else query.shape[:2])

    return attention


def _on_scaled(attend: Attention, plan: Plan, selected: bool = False) -> Attention:
    """`_on_gathered` with the gain: every frame is a batch entry with scaled keys of its own."""
    index = plan.key_index.flatten()
    factors = _factors(plan)

    def gathered(tokens: Tensor) -> Tensor:
        if selected:
            return tokens.unsqueeze(1)
        return tokens.flatten(1, 2).index_select(1, index).unflatten(1, plan.key_index.shape)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys = gathered(key) * factors(key.dtype)
        values = gathered(value).expand_as(keys)
        mixed = attend(*(t.flatten(0, 1) for t in (query, keys, values)))
        return mixed.unflatten(0, query.shape[:2])

    return attention


def _by_frame(attend: Attention, plan: Plan) -> Attention:
    """`_on_scaled` of keys that frames share, one frame after the other: no value is copied."""
    index = plan.key_index[0]
    factors = _factors(plan)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = (t.flatten(1, 2).index_select(1, index) for t in (key, value))
        pairs = zip(query.unbind(1), factors(key.dtype), strict=True)
        mixed = [attend(queries, keys * factor, values) for queries, factor in pairs]
        return torch.stack(mixed, dim=1)

    return attention


def _factors(plan: Plan) -> Callable[[torch.dtype], Tensor]:
    """What each query frame's keys are multiplied by, [num_frames, num_keys, 1, 1], in a dtype."""
    gains = torch.where(plan.is_cross_frame, plan.cross_frame_gain, 1.0)[..., None, None]
    return cache(gains.to)


def _heads_first(attend: Callable[..., Any]) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed: Tensor = attend(*(t.transpose(1, 2) for t in (query, key, value)))
        return mixed.transpose(1, 2)

    return attention


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return _heads_first(scaled_dot_product_attention)(query, key, value)


def _flex(plan: Plan, compiled: bool) -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    key_frame, gain, num_tokens = plan.key_frame, plan.cross_frame_gain, plan.num_tokens
    num_frames, shared = plan.num_frames, plan.rows == "shared"

    def gained(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        frame = query // num_tokens if shared else batch % num_frames
        of_key = key_frame[0 if shared else frame, key]
        return torch.where((of_key == frame) | (of_key == -1), score, score * gain)

    # Whole and for one shape: beyond its limit of shapes it would fall back in silence.
    attend: Any = flex_attention
    if compiled:
        attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return _heads_first(partial(attend, score_mod=gained) if plan.scales_logits else attend)


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    mixed: Tensor = memory_efficient_attention(query, key, value)
    return mixed


def _flash_attn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    mixed: Tensor = flash_attn_func(query, key, value)
    return mixed
