"""Launches the kernels: implementations of the operators ``triton_fwd`` and ``triton_bwd``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import gcd
from threading import RLock
from typing import Any, NamedTuple

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
from tokenmix_ops.backends.triton.layout import Layout, Strides, Tile

KERNELS = {
    "fwd_resident": fwd_resident_kernel,
    "fwd_streamed": fwd_streamed_kernel,
    "bwd_resident": bwd_resident_kernel,
    "bwd_query": bwd_query_kernel,
    "bwd_key": bwd_key_kernel,
}
"""The kernels under the names that launch configurations use."""

_first_launch = RLock()
# Triton loads a compiled kernel into the driver at its first launch, unprotected: a second thread
# may find it half loaded and launch a null function. Several kinds may share one compiled kernel,
# hence one lock for all; reentrant, because Triton's hooks may launch kernels too.


class Launch:
    """A kernel for one kind of call.

    Caches the compiled kernel, so later launches skip Triton's dispatcher.
    """

    def __init__(self, name: str, config: Config, layout: Layout, **constants: Any) -> None:
        self.kernel: Any = KERNELS[name]
        self.config = config
        given = {"L": layout, **constants, **tile_constants(self.kernel, layout, config)}
        self.constants = {name: given[name] for name in self.kernel.arg_names if name in given}
        self.options = options(config, layout)
        self.compiled: Any = None
        self.num_tensors = 0

    def __call__(self, programs: int, *arguments: Any) -> None:
        if programs >= 2**31:
            raise RuntimeError(
                f"{programs} programs exceed the 2**31 - 1 of a grid; split the batch"
            )
        if self.compiled is not None:
            self._run(programs, arguments)
            return
        with _first_launch:
            # They come first.
            self.num_tensors = sum(isinstance(argument, Tensor) for argument in arguments)
            self.compiled = self.kernel[(programs,)](*arguments, **self.constants, **self.options)

    def _run(self, programs: int, arguments: tuple[Any, ...]) -> None:
        """Does what ``self.compiled[grid]`` does, in a fraction of its time if no hook watches
        launches, and without having the driver check each address: PyTorch's are the GPU's own."""
        compiled, constants = self.compiled, self.constants.values()
        hooks = triton.knobs.runtime
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            compiled[(programs, 1, 1)](*arguments, *constants)
            return
        driver = triton.runtime.driver.active
        stream = driver.get_current_stream(driver.get_current_device())
        kernel = (compiled.function, compiled.packed_metadata)
        addresses = [tensor.data_ptr() for tensor in arguments[: self.num_tensors]]
        numbers = arguments[self.num_tensors :]
        no_hooks = (None, None, None)
        compiled.run(programs, 1, 1, stream, *kernel, *no_hooks, *addresses, *numbers, *constants)


def options(config: Config, layout: Layout) -> dict[str, Any]:
    """Returns what Triton's compiler is told beside a kernel's constants."""
    gain_of_each_key = layout.gains and not layout.gain_period
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Gains of single keys take more registers than were counted on.
        "maxnreg": None if gain_of_each_key else config.maxnreg,
        "enable_fp_fusion": True,
    }


def tile_constants(kernel: Any, layout: Layout, config: Config) -> dict[str, Any]:
    """Returns what a kernel is compiled for by its launch configuration."""
    tiles: dict[str, Any] = {
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_D": max(16, triton.next_power_of_2(layout.head_dim)),
        "TILES": key_tiles(layout.num_keys, config.BLOCK_N),
        "PERIOD": layout.gain_period if config.gain_by_frame else 0,
    }
    return {name: tiles[name] for name in kernel.arg_names if name in tiles}


def key_tiles(num_keys: int, width: int) -> tuple[Tile, ...]:
    """Covers the keys with tiles: full ones, then at most two narrower ones.

    Widths are powers of two, at least 16. Two narrow tiles often waste less than one: 204 keys
    are 128 + 64 + 16, not 128 + 128.
    """
    full = num_keys // width
    tiles = [Tile(i * width, width, ragged=False) for i in range(full)]
    start, rest = full * width, num_keys % width
    if rest:
        one = max(16, triton.next_power_of_2(rest))
        two = (one // 2, max(16, triton.next_power_of_2(max(rest - one // 2, 1))))
        widths = two if one > 16 and sum(two) < one else (one,)
        for narrow in widths:
            tiles.append(Tile(start, narrow, ragged=start + narrow > num_keys))
            start += narrow
    return tuple(tiles)


@lru_cache(maxsize=4096)
def tiles_per_program(groups: int, tiles: int, at_once: int) -> int:
    """Returns how many of a group's query tiles one program should handle.

    The GPU runs ``at_once`` programs, in waves. Each program first loads its keys, which takes
    about as long as a tile.
    """

    def duration(each: int) -> int:
        programs = groups * -(-tiles // each)
        return -(-programs // at_once) * (each + 1)

    return min(range(1, tiles + 1), key=lambda each: (duration(each), -each))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_index: Tensor,
    key_frame: Tensor,
    row_dim: int | None,
    num_tokens: int,
    num_prefix_tokens: int,
    num_full_tokens: int | None,
    cross_frame_gain: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operator ``triton_fwd``. The table's shape tells what row_dim does, None or 1."""
    output, lse = ops.empty_output(query)
    if query.shape[0] == 0:
        return output, lse
    video = (num_tokens, num_prefix_tokens, num_full_tokens)
    kind = _kind(query, key, value, key_index, key_frame, video, cross_frame_gain)
    layout, launch, strides = _forward_launch(kind, scale < 0)
    groups = query.shape[0] * layout.num_rows * layout.num_heads
    tiles = -(-layout.group_queries // launch.config.BLOCK_M)
    tensors = (query, key, value, output, lse, key_index, key_frame)
    # Slots past the last one have logits of -inf, and -inf * 0 is NaN.
    magnitude = max(abs(scale), 2.0**-126)
    with _on_device_of(query):
        if launch.kernel is fwd_streamed_kernel:
            launch(groups * tiles, *tensors, *strides, magnitude, cross_frame_gain)
        else:
            at_once = launch.config.programs_per_sm * _num_sms(query.device)
            each = tiles_per_program(groups, tiles, at_once)
            programs = groups * -(-tiles // each)
            launch(programs, *tensors, *strides, magnitude, cross_frame_gain, each)
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
    row_dim: int | None,
    num_tokens: int,
    num_prefix_tokens: int,
    num_full_tokens: int | None,
    cross_frame_gain: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``triton_bwd``, with row_dim as in `forward`."""
    grads = ops.empty_gradients(query, key, value)
    if query.shape[0] == 0:
        return grads
    query_grad, key_grad, value_grad = grads
    if output_grad.stride(-1) != 1:
        output_grad = output_grad.contiguous()
    output, lse = output.contiguous(), lse.contiguous()
    video = (num_tokens, num_prefix_tokens, num_full_tokens)
    kind = _kind(query, key, value, key_index, key_frame, video, cross_frame_gain)
    of_grads = (output_grad.stride(), key_grad.stride(), value_grad.stride())
    starts = (
        output_grad.data_ptr() % 16,
        output.data_ptr() % 16,
        lse.data_ptr() % 16,
        token_order.data_ptr() % 16,
        use_start.data_ptr() % 16,
        uses.data_ptr() % 16,
    )
    layout, resident, by_query, by_key, read, written = _backward_launches(kind, of_grads, starts)
    groups = query.shape[0] * layout.num_rows * layout.num_heads
    numbers = (scale, cross_frame_gain)
    with _on_device_of(query):
        if resident and groups >= resident.config.programs_per_sm * _num_sms(query.device):
            tensors = [output_grad, query, key, value, output, lse, *grads]
            resident(groups, *tensors, key_index, key_frame, *read, *written, *numbers)
            return grads
        delta = torch.empty_like(lse)
        tiles = -(-layout.group_queries // by_query.config.BLOCK_M)
        tensors = [output_grad, query, key, value, output, lse, query_grad, delta]
        by_query(groups * tiles, *tensors, key_index, key_frame, *read, *numbers)

        width = by_key.config.BLOCK_N
        if layout.by_token:
            tiles = -(-layout.num_frames * layout.num_tokens // width)
            programs = query.shape[0] * layout.num_heads * tiles
        else:
            tiles = -(-layout.num_keys // width) - (-layout.num_unselected // width)
            programs = groups * tiles
        tensors = [output_grad, query, key, value, lse, delta, key_grad, value_grad]
        tables = (key_index, key_frame, token_order, use_start, uses)
        by_key(programs, *tensors, *tables, *read, *written, *numbers)
    return grads


def architecture(device: torch.device) -> configs.Architecture:
    """Returns the launch configurations for a device: a GPU, or the interpreter's CPU."""
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


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


class Kind(NamedTuple):
    """Everything that selects the kernels of a call and that they are compiled for.

    Each call builds a plain tuple of these fields as a cache key, which is faster to create.
    """

    device: torch.device
    dtype: torch.dtype
    query_shape: tuple[int, ...]
    """Without the batch."""
    table_shape: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    """Of query, key and value, as PyTorch counts them."""
    starts: tuple[int, ...]
    """Addresses of query, key, value, key_index and key_frame, modulo 16. Memory that a call
    allocates is aligned."""
    video: tuple[int, int, int | None]
    """num_tokens, num_prefix_tokens and num_full_tokens of the plan."""
    gains: bool
    tf32: bool
    """Whether products are in float32 and PyTorch allows TF32."""


def _kind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_index: Tensor,
    key_frame: Tensor,
    video: tuple[int, int, int | None],
    cross_frame_gain: float,
) -> tuple[Any, ...]:
    """The fields of `Kind`."""
    return (
        query.device,
        query.dtype,
        query.shape[1:],
        key_index.shape,
        (query.stride(), key.stride(), value.stride()),
        (
            query.data_ptr() % 16,
            key.data_ptr() % 16,
            value.data_ptr() % 16,
            key_index.data_ptr() % 16,
            key_frame.data_ptr() % 16,
        ),
        video,
        cross_frame_gain != 1.0,
        query.dtype == torch.float32 and _tf32_is_allowed(),
    )


def _tf32_is_allowed() -> bool:
    # Also reflects allow_tf32 and set_float32_matmul_precision, which can raise when read.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _layout(
    kind: Kind, of_grads: tuple[tuple[int, ...], ...] = (), starts: tuple[int, ...] = ()
) -> Layout:
    """``of_grads`` and ``starts``: strides of the gradients, and addresses of the output and its
    gradient modulo 16."""
    num_frames, num_queries, num_heads, head_dim = kind.query_shape
    num_rows, num_keys = kind.table_shape
    num_tokens, num_prefix_tokens, num_full_tokens = kind.video
    tokens = max(num_tokens, num_keys)
    contiguous = (0, num_queries * num_heads * head_dim, num_heads * head_dim, head_dim, 1)
    apart = [_strides(strides) for strides in (*kind.strides, *of_grads, contiguous)]
    reach = max(num_frames * strides.frame + tokens * strides.token for strides in apart)
    steps = (kind.dtype.itemsize * number for strides in apart for number in strides)
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
        selected=len(kind.strides[1]) == 4,
        gains=kind.gains,
        precision="tf32" if kind.tf32 else "ieee",
        upcast=kind.dtype == torch.bfloat16 and kind.device.type != "cuda",
        wide=reach >= 2**31,
        alignment=gcd(16, *kind.starts[:3], *starts, *steps),
    )


def _find(name: str, kind: Kind, layout: Layout) -> Config | None:
    bits = 8 * kind.dtype.itemsize
    return architecture(kind.device).find(name, bits, layout.head_dim, layout.num_keys)


def _find_any(name: str, kind: Kind, layout: Layout) -> Config:
    config = _find(name, kind, layout)
    if config is None:
        raise RuntimeError(
            f"no launch configuration of {name} for {kind.dtype}, head_dim {layout.head_dim}, "
            f"{layout.num_keys} keys on {_name(kind.device)}"
        )
    return config


def _strides(strides: tuple[int, ...]) -> Strides:
    """Of [batch, num_frames, num_tokens, num_heads, head_dim], or of selected keys."""
    video, *frame, token, head, _ = strides
    return Strides(video, frame[0] if frame else 0, token, head)


def _flat(tensors: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Flattens the strides of several tensors into kernel arguments."""
    return tuple(number for strides in tensors for number in _strides(strides))


@lru_cache(maxsize=4096)
def _forward_launch(
    fields: tuple[Any, ...], negative: bool
) -> tuple[Layout, Launch, tuple[int, ...]]:
    kind = Kind(*fields)
    layout = _layout(kind)
    name, config = "fwd_resident", _find("fwd_resident", kind, layout)
    if config is None:
        name, config = "fwd_streamed", _find_any("fwd_streamed", kind, layout)
    launch = Launch(name, config, layout, NEGATIVE=negative)
    return layout, launch, _flat(kind.strides)


@lru_cache(maxsize=4096)
def _backward_launches(
    fields: tuple[Any, ...], of_grads: tuple[tuple[int, ...], ...], starts: tuple[int, ...]
) -> tuple[Layout, Launch | None, Launch, Launch, tuple[int, ...], tuple[int, ...]]:
    """``of_grads`` are strides of the gradients of output, key and value; ``starts`` are addresses
    of the output's gradient, output, lse, token_order, use_start and uses, modulo 16."""
    kind = Kind(*fields)
    layout = _layout(kind, of_grads, starts[:2])
    config = None if layout.by_token else _find("bwd_resident", kind, layout)
    resident = Launch("bwd_resident", config, layout) if config else None
    by_query, by_key = (
        Launch(name, _find_any(name, kind, layout), layout) for name in ("bwd_query", "bwd_key")
    )
    read, written = _flat((of_grads[0], *kind.strides)), _flat(of_grads[1:])
    return layout, resident, by_query, by_key, read, written
