"""Token-mixing attention by a fused C++ kernel for CPUs, forward and backward.

The library is built when tokenmix_ops is installed, if a compiler is there; the first use loads it.
It holds the kernel for several instruction sets and takes the widest that the processor has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmix_ops import ops
from tokenmix_ops.plan import Plan
from tokenmix_ops.torch_internals import cached_constant, have_tangent, in_transform

name = "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
# setup.py writes one of the two.
LIBRARY = Path(__file__).parents[1] / "lib" / "libtokenmix_cpu.so"
REASON = LIBRARY.with_name("no_cpu.txt")


@cached_constant
def unavailable() -> str | None:
    """Why this machine cannot run the backend; None if it can."""
    if LIBRARY.exists():
        return _failure_to_load(LIBRARY)
    if REASON.exists():
        return REASON.read_text("utf-8").strip()
    return "the native library is not built; install tokenmix_ops with pip, or run make native"


def _failure_to_load(library: Path) -> str | None:
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the native library does not load: {error.__cause__ or error}"
    return None


def unsupported(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    """Why the backend cannot compute this call; None if it can."""
    if query.dtype not in DTYPES:
        return f"supports float16, bfloat16 and float32, got {query.dtype}"
    if query.device.type != "cpu":
        return f"needs tensors on a CPU, got {query.device}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim is at most {MAX_HEAD_DIM}, got {query.shape[-1]}"
    if not torch.compiler.is_compiling() and in_transform():
        return "does not support torch.func transforms"
    if have_tangent(query, key, value):
        return "does not support forward-mode derivatives"
    return None


def not_preferred(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    """Why the automatic choice skips the backend for a call that it can compute; None if not."""
    if torch.compiler.is_exporting():
        return "an exported program would need tokenmix_ops to run; request it by name"
    if not _has_measured_vectors():
        return "not measured on this processor; request it by name"
    return None


@cached_constant
def _has_measured_vectors() -> bool:
    """Whether the processor has more than portable vectors, which nobody has timed."""
    return instruction_sets()[1] != ("portable",)


def token_mix_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float
) -> Tensor:
    """Expects arguments that `tokenmix_ops.token_mix_attention` has validated."""
    return ops.attention(name, query, key, value, plan, scale)


def instruction_sets() -> tuple[str, tuple[str, ...]]:
    """The one that the kernel uses, and all that it has and this processor supports, the widest
    last. Requires that the backend is available."""
    used, *supported = torch.ops.tokenmix_ops.cpu_isas().split()
    return used, tuple(supported)


def description() -> str:
    """One line about a library that is available."""
    used, _ = instruction_sets()
    built = torch.ops.tokenmix_ops.cpu_torch_of_build()
    return f"uses {in_words(used)}; built with PyTorch {built}"


def in_words(isa: str) -> str:
    """What the kernel computes with if it uses an instruction set: AMX has no float32 products."""
    return "avx512, and amx for bfloat16" if isa == "amx" else isa


def _after_loading(operator: str) -> Callable[..., Any]:
    """An operator's implementation until the library is loaded, as in a program that was exported
    by another process."""

    def call(*arguments: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        fault = _not_for_cpu_key(tensors) or unavailable()
        if fault is not None:
            raise RuntimeError(f"tokenmix_ops::{operator} cannot run: {fault}")
        return getattr(torch.ops.tokenmix_ops, operator)(*arguments)

    return call


def _not_for_cpu_key(tensors: list[Tensor]) -> str | None:
    """Why these tensors would come back here after loading; None if they would not."""
    for x in tensors:
        if x.device.type != "cpu":
            return f"needs tensors on a CPU, got {x.device}"
        if x.layout is not torch.strided:
            return f"needs dense tensors, got {x.layout}"
    return None


# The library registers for the key CPU, which comes before this one.
ops.define(
    name,
    _after_loading("cpu_fwd"),
    _after_loading("cpu_bwd"),
    keys=("CompositeExplicitAutograd",),
)
