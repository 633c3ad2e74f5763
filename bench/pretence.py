"""A GPU that is not there: the Triton backend launches its kernels as ever, which compiles them for
it, and nothing runs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CAPABILITY = (9, 0)
HOPPER = SimpleNamespace(
    name="pretended sm_90",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    L2_cache_size=50 * 2**20,
    shared_memory_per_multiprocessor=233_472,
    shared_memory_per_block_optin=232_448,
)
"""What PyTorch would say of an H100."""


def pretend() -> None:
    """Has this process believe in an H100, until it ends; for processes of their own.

    From then on tensors have no numbers. A forward pass of the Triton backend compiles the kernels
    of the backward pass too, because autograd cannot run without a real GPU: call it without.
    Expects TRITON_INTERPRET to be off, and a build of PyTorch with CUDA: others know only some
    operators of such tensors.
    """
    from triton.runtime.driver import driver

    from tokenmix_ops.backends import triton

    # Not `is_available`: PyTorch has to go on knowing better, or fake tensors would use the GPU.
    for owner, name, answer in (
        (triton, "unavailable", lambda: None),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
        (torch.cuda, "get_device_properties", lambda device=None: HOPPER),
        # Every allocation begins at a multiple of 16 bytes, as on a GPU.
        (FakeTensor, "data_ptr", lambda tensor: tensor.storage_offset() * tensor.element_size()),
    ):
        setattr(owner, name, answer)
    driver.set_active(Driver())
    FakeTensorMode().__enter__()
    _Launches().__enter__()


class Driver:
    """What Triton asks a GPU's driver for."""

    utils = SimpleNamespace(
        load_binary=lambda name, binary, shared, device: (1, 1, 0, 0, 1024),
        get_device_properties=lambda device: {
            "max_shared_mem": HOPPER.shared_memory_per_block_optin
        },
    )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *arguments: None


class _Launches(TorchDispatchMode):
    """Runs the Triton backend's implementation of its operator on fake tensors."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not torch.ops.tokenmix_ops.triton_fwd.default:
            return func(*args, **(kwargs or {}))
        from tokenmix_ops.backends.triton import launch

        output, lse = launch.forward(*args)
        query, key, value, key_index, key_frame, *numbers = args
        # In place of the tables that only gradients need: of their dtype, and aligned as they are.
        tables = (key_index, key_frame, key_index, key_index, key_index)
        grad = torch.empty_like(output)
        launch.backward(grad, query, key, value, output, lse, *tables, *numbers)
        return output, lse
