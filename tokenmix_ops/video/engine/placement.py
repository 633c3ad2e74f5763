"""Where a model computes: on one device, copied to many, or divided among them."""

from __future__ import annotations

import atexit
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tokenmix_ops.video.engine.hyperparameters import Training

PATIENCE = timedelta(hours=12)
"""How long a process waits for another, which may be downloading a model or scoring captions.

A process that has ended is noticed at once, by the launcher."""


def start_accelerator(settings: Training, **options: Any) -> Accelerator:
    """The accelerator for a precision. Raises ValueError for fp16 on a CPU."""
    # A second training in the same process may want another precision than the first.
    AcceleratorState._reset_state()
    # Without a GPU, accelerate forms a group of processes only when told to compute on CPUs.
    accelerator = Accelerator(
        mixed_precision=settings.precision,
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        **options,
    )
    if settings.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU: choose bf16, or no mixed precision")
    if accelerator.num_processes > 1:
        # A process that ends with its group alive may be aborted, with all its work done.
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)
    return accelerator


def _leave_group() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def place(model: nn.Module, accelerator: Accelerator, fsdp: bool) -> nn.Module:
    """The module to call in training; its parameters are the model's, and now on the device.

    With several processes, every parameter that is trained has to take part in every update; DDP
    and FSDP raise RuntimeError otherwise. Raises ValueError for ``fsdp`` with one process.
    """
    model.to(accelerator.device)
    if accelerator.num_processes == 1:
        if fsdp:
            raise ValueError("fsdp divides a model among processes, and there is one: start more")
        return model
    # What is random in a model must start as the first process has it.
    for value in (*model.parameters(), *model.buffers()):
        distributed.broadcast(value.detach(), src=0)
    if fsdp:
        return shard(model)
    with warnings.catch_warnings():
        # PyTorch 2.13 has another name for broadcast_buffers, which earlier ones do not know.
        warnings.simplefilter("ignore", FutureWarning)
        # Buffers are the task's to keep alike.
        return DistributedDataParallel(model, broadcast_buffers=False)


def shard(model: nn.Module) -> nn.Module:
    """Divides parameters in place: those of each layer together, and the rest together.

    A layer is an entry of an outermost ``ModuleList``, except in children that a module names in
    ``called_in_parts``: those use parameters outside their layer's call. Weights stay in
    float32, as with copies on every process: autocast does the mixed precision. Frozen parameters
    that two modules share stay whole, because a parameter can belong to one layer only. In an
    update, all processes must use the same parameters. Raises ValueError for a parameter without a
    dimension.
    """
    for name, value in model.named_parameters():
        if value.dim() == 0:
            raise ValueError(f"fsdp cannot divide {name}, a number: give it the shape (1,)")
    uses = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    shared = {p for p in model.parameters() if uses[id(p)] > 1 and not p.requires_grad}
    for layer in _layers(model):
        fully_shard(layer, ignored_params=shared)
    fully_shard(model, ignored_params=shared)
    return model


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif name not in getattr(model, "called_in_parts", ()):
            yield from _layers(child)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within it, a divided model is as one that is not: whole parameters, also in ``state_dict``,
    and any submodule may be called. All processes enter it together."""
    if not isinstance(model, FSDPModule):
        yield
        return
    # A submodule that is called before the model itself would take itself for the outermost.
    model._get_fsdp_state()._lazy_init()
    modules = list(model.modules())
    parts = [module for module in modules if isinstance(module, FSDPModule)]
    # ``state_dict`` would divide the parameters again before it reads them.
    hooks = [module._state_dict_pre_hooks.copy() for module in modules]
    for module in modules:
        module._state_dict_pre_hooks.clear()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for module, own in zip(modules, hooks, strict=True):
            module._state_dict_pre_hooks.update(own)
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def gathered(value: Tensor) -> Tensor:
    """A whole tensor, from its parts on all processes if it is divided."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one that may be divided."""
    value = value.to(target.device)
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(value, target.device_mesh, target.placements))
    else:
        target.copy_(value)
