"""Token-mixing attention by fused Triton kernels, forward and backward.

The kernels read keys and values in place, in the caller's layout, and never materialise the mixed
tensors. They run on CUDA GPUs; on CPU tensors only under Triton's interpreter (TRITON_INTERPRET=1),
for experiments and tests.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tokenmix_ops import ops
from tokenmix_ops.plan import Plan
from tokenmix_ops.torch_internals import cached_constant, guarded, have_tangent, in_transform

name = "triton"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


@cached_constant
def unavailable() -> str | None:
    """Why this machine cannot run the backend; None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed; pip install 'tokenmix_ops[triton]'"
    if interpreted():
        return _interpreter_fault()
    if not torch.cuda.is_available():
        return "no CUDA GPU (TRITON_INTERPRET=1 in the environment runs it on a CPU, very slowly)"
    return None


@cached_constant
def interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _interpreter_fault() -> str | None:
    """Why Triton's interpreter would fail here; None if it works."""
    if find_spec("numpy") is None:
        return "Triton's interpreter needs NumPy; pip install numpy"
    # Until 3.7 it turned arrays of one number into integers, which NumPy 2.4 forbids.
    old, new = (tuple(map(int, version(n).split(".")[:2])) for n in ("triton", "numpy"))
    if old < (3, 7) and new >= (2, 4):
        return (
            f"the interpreter of Triton {version('triton')} fails with NumPy {version('numpy')}; "
            "pip install 'numpy<2.4'"
        )
    return None


def unsupported(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    """Why the backend cannot compute this call; None if it can."""
    if query.dtype not in DTYPES:
        return f"supports float16, bfloat16 and float32, got {query.dtype}"
    if plan.rows == "token":
        return "does not support mixings whose keys depend on the query's token"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim is at most {MAX_HEAD_DIM}, got {query.shape[-1]}"
    if query.device.type != ("cpu" if interpreted() else "cuda"):
        wanted = "a CPU, under Triton's interpreter" if interpreted() else "a CUDA GPU"
        return f"needs tensors on {wanted}, got {query.device}"
    if query.device.type == "cuda" and (old := _too_old(query.device)):
        return old
    if not torch.compiler.is_compiling() and in_transform():
        return "does not support torch.func transforms"
    if have_tangent(query, key, value):
        return "does not support forward-mode derivatives"
    return None


@cached_constant
def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return None
    return f"needs an Ampere GPU or a later one (sm_80), got sm_{capability[0]}{capability[1]}"


def not_preferred(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    """Why the automatic choice skips the backend for a call that it can compute; None if not."""
    return _unmeasured(query.device, query.dtype, guarded(query.shape[-1]))


@cached_constant
def _unmeasured(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if interpreted():
        return "slow under Triton's interpreter; request it by name"
    from tokenmix_ops.backends.triton import launch

    architecture, bits = launch.architecture(device), 8 * dtype.itemsize
    if any(e["dtype_bits"] == bits and head_dim <= e["head_dim"] for e in architecture.fastest):
        return None
    return (
        f"not measured to be the fastest for {dtype} and head_dim {head_dim} on "
        f"{architecture.name}; request it by name"
    )


def token_mix_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float
) -> Tensor:
    """Expects arguments that `tokenmix_ops.token_mix_attention` has validated."""
    return ops.attention(name, query, key, value, plan, scale)


@lru_cache
def _launch() -> Any:
    """The module that launches; imported late because it imports Triton."""
    from tokenmix_ops.backends.triton import launch

    return launch


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    return _launch().forward(*arguments)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    return _launch().backward(*arguments)


ops.define(name, _forward, _backward)
