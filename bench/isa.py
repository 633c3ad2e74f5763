"""The instruction set of a CPU, and a narrower one that all contenders are limited to.

Imports PyTorch late: it reads its choice from the environment when it is imported.
"""

from __future__ import annotations

import os

VARIABLES = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
}
"""By the kernel's name of an instruction set: what limits PyTorch, MKL and oneDNN to it, AVX-512
without the later bfloat16 products and tiles."""


def force(isa: str) -> None:
    """Makes this process compute as on a processor that has nothing wider than ``isa``.

    Raises RuntimeError if PyTorch was imported before under another one, or if this processor
    lacks it.
    """
    os.environ |= VARIABLES[isa]
    import torch

    found = torch.backends.cpu.get_cpu_capability().lower()
    if found != isa:
        raise RuntimeError(
            f"expected PyTorch to use {isa}, got {found}: this processor lacks it, or PyTorch was "
            "imported before"
        )
    from tokenmix_ops.backends import cpu

    if cpu.unavailable() is None:
        torch.ops.tokenmix_ops.cpu_force_isa(isa)


def used() -> str:
    """The kernel's instruction set; "none" without a kernel."""
    from tokenmix_ops.backends import cpu

    return "none" if cpu.unavailable() else cpu.instruction_sets()[0]
