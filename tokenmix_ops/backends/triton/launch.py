"""From tensors to kernel launches: what the operators ``triton_fwd`` and ``triton_bwd`` run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from tokenmix_ops import ops
from tokenmix_ops.backends.triton import configs
from tokenmix_ops.backends.triton.backward import (
    bwd_key_kernel,
    bwd_query_kernel,
    bwd_resident_kernel,
)
from tokenmix_ops.backends.triton.configs import Config
from tokenmix_ops.backends.triton.forward import fwd_resident_kernel, fwd_streamed_kernel
from tokenmix_ops.backends.triton.layout import Layout

KERNELS = {
    "fwd_resident": fwd_resident_kernel,
    "fwd_streamed": fwd_streamed_kernel,
    "bwd_resident": bwd_resident_kernel,
    "bwd_query": bwd_query_kernel,
    "bwd_key": bwd_key_kernel,
}
"""By the names that launch configurations use."""


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_index: Tensor,
    key_frame: Tensor,
    num_tokens: int,
    num_prefix_tokens: int,
    num_full_tokens: int | None,
    cross_frame_gain: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operator ``triton_fwd``."""
    output, lse = ops.empty_output(query)
    if query.shape[0] == 0:
        return output, lse
    layout = _layout_of(
        query, key, key_index, num_tokens, num_prefix_tokens, num_full_tokens, cross_frame_gain
    )
    groups = query.shape[0] * layout.num_rows * layout.num_heads
    arguments: list[Any] = [query, key, value, output, lse, key_index, key_frame]
    arguments += [*query.stride()[:4], *_strides(key), *_strides(value)]
    arguments += [abs(scale), cross_frame_gain]
    constants = {"L": layout, "NEGATIVE": scale < 0}
    config = _find("fwd_resident", query, layout)
    with _on_device_of(query):
        if config is not None:
            tiles = triton.cdiv(layout.group_queries, config.BLOCK_M)
            wanted = config.programs_per_sm * _num_sms(query.device)
            programs = min(tiles, triton.cdiv(wanted, groups))
            each = triton.cdiv(tiles, programs)
            _run(
                fwd_resident_kernel,
                groups * triton.cdiv(tiles, each),
                config,
                layout,
                [*arguments, each],
                constants,
            )
        else:
            config = _find_any("fwd_streamed", query, layout)
            programs = groups * triton.cdiv(layout.group_queries, config.BLOCK_M)
            _run(fwd_streamed_kernel, programs, config, layout, arguments, constants)
    return output, lse


def backward(
    output_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    key_index: Tensor,
    key_frame: Tensor,
    token_order: Tensor,
    use_start: Tensor,
    uses: Tensor,
    num_tokens: int,
    num_prefix_tokens: int,
    num_full_tokens: int | None,
    cross_frame_gain: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``triton_bwd``."""
    grads = ops.empty_gradients(query, key, value)
    if query.shape[0] == 0:
        return grads
    query_grad, key_grad, value_grad = grads
    if output_grad.stride(-1) != 1:
        output_grad = output_grad.contiguous()
    layout = _layout_of(
        query, key, key_index, num_tokens, num_prefix_tokens, num_full_tokens, cross_frame_gain
    )
    groups = query.shape[0] * layout.num_rows * layout.num_heads
    read = [*output_grad.stride()[:4], *query.stride()[:4], *_strides(key), *_strides(value)]
    written = [*_strides(key_grad), *_strides(value_grad)]
    numbers = [scale, cross_frame_gain]
    constants = {"L": layout}
    config = None if layout.by_token else _find("bwd_resident", query, layout)
    with _on_device_of(query):
        if config is not None and groups >= config.programs_per_sm * _num_sms(query.device):
            tensors = [output_grad, query, key, value, output, lse, *grads, key_index, key_frame]
            arguments: list[Any] = [*tensors, *read, *written, *numbers]
            _run(bwd_resident_kernel, groups, config, layout, arguments, constants)
            return grads

        delta = torch.empty_like(lse)
        tensors = [output_grad, query, key, value, output, lse, query_grad, delta]
        config = _find_any("bwd_query", query, layout)
        programs = groups * triton.cdiv(layout.group_queries, config.BLOCK_M)
        arguments = [*tensors, key_index, key_frame, *read, *numbers]
        _run(bwd_query_kernel, programs, config, layout, arguments, constants)

        tensors = [output_grad, query, key, value, lse, delta, key_grad, value_grad]
        config = _find_any("bwd_key", query, layout)
        tables = [key_index, key_frame, token_order, use_start, uses]
        if layout.by_token:
            tiles = triton.cdiv(layout.num_frames * layout.num_tokens, config.BLOCK_N)
            programs = query.shape[0] * layout.num_heads * tiles
        else:
            tiles = triton.cdiv(layout.num_keys, config.BLOCK_N)
            tiles += triton.cdiv(layout.num_unselected, config.BLOCK_N)
            programs = groups * tiles
        arguments = [*tensors, *tables, *read, *written, *numbers]
        _run(bwd_key_kernel, programs, config, layout, arguments, constants)
    return grads


def architecture(device: torch.device) -> configs.Architecture:
    """The launch configurations for a device: a GPU, or the interpreter's CPU."""
    return configs.load(_name(device))


@lru_cache
def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@lru_cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _find(kernel: str, query: Tensor, layout: Layout) -> Config | None:
    bits = 8 * query.element_size()
    return architecture(query.device).find(kernel, bits, layout.head_dim, layout.num_keys)


def _find_any(kernel: str, query: Tensor, layout: Layout) -> Config:
    config = _find(kernel, query, layout)
    if config is None:
        raise RuntimeError(
            f"no launch configuration of {kernel} for {query.dtype}, head_dim {layout.head_dim}, "
            f"{layout.num_keys} keys on {_name(query.device)}"
        )
    return config


def _run(
    kernel: Any,
    programs: int,
    config: Config,
    layout: Layout,
    arguments: list[Any],
    constants: dict[str, Any],
) -> None:
    if programs >= 2**31:
        raise RuntimeError(f"{programs} programs exceed the 2**31 - 1 of a grid; split the batch")
    tiles = tile_constants(kernel, layout, config)
    kernel[(programs,)](
        *arguments,
        **constants,
        **tiles,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def tile_constants(kernel: Any, layout: Layout, config: Config) -> dict[str, int]:
    """The tile sizes that a kernel is compiled for."""
    tiles = {
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_D": max(16, triton.next_power_of_2(layout.head_dim)),
    }
    if "TAIL" in kernel.arg_names:
        rest = layout.num_keys % config.BLOCK_N
        tiles["TAIL"] = max(16, triton.next_power_of_2(rest)) if rest else 0
    return tiles


def _layout_of(
    query: Tensor,
    key: Tensor,
    key_index: Tensor,
    num_tokens: int,
    num_prefix_tokens: int,
    num_full_tokens: int | None,
    cross_frame_gain: float,
) -> Layout:
    _, num_frames, num_queries, num_heads, head_dim = query.shape
    num_rows, num_keys = key_index.shape
    allow_tf32 = query.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return Layout(
        num_frames=num_frames,
        group_frames=num_frames // num_rows,
        num_queries=num_queries,
        num_tokens=num_tokens,
        num_prefix_tokens=num_prefix_tokens,
        num_heads=num_heads,
        head_dim=head_dim,
        num_keys=num_keys,
        num_full_tokens=-1 if num_full_tokens is None else num_full_tokens,
        selected=key.dim() == 4,
        gains=cross_frame_gain != 1.0,
        precision="tf32" if allow_tf32 else "ieee",
        upcast=query.dtype == torch.bfloat16 and not query.is_cuda,
    )


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of batch, frame, token and head; selected keys have no frames."""
    strides = tensor.stride()
    return strides[:4] if tensor.dim() == 5 else (strides[0], 0, *strides[1:3])


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
