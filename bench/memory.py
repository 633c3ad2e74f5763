"""Peak memory of fine-tuning at the paper's size, worked out by fake tensors: no GPU, no memory.

Every tensor of two updates exists in name only; a dispatch mode adds up the storages that live,
each rounded up to 512 bytes as PyTorch's allocator for CUDA does, and keeps the peak of the second
update, by which AdamW has its states. PyTorch's own MemTracker does not serve: it puts hooks on
every parameter, which a frozen one refuses, and on every module, which then is no plain linear
layer any more.

Autograd takes fake CUDA tensors only in a build of PyTorch for CUDA, so these are CPU tensors, and
`AsOnCuda` sees to it that what a graph keeps is what it keeps on a GPU: attention through
scaled_dot_product_attention keeps query, key, value, output and a float32 for each query, with
dropout too; dropout keeps a mask of bytes; autocast leaves softmax and layer norms in float32. Not
counted are what kernels use inside themselves, the allocator's fragments, and the CUDA context.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.rows import Row
from bench.tables.tuning import KINDS
from bench.training import Run, Size, Training, about, build
from tokenmix_ops.timing import rounded

BLOCK = 512
"""Bytes that PyTorch's allocator for CUDA rounds up to."""
SOFTMAX = {
    functional.softmax,
    functional.log_softmax,
    functional.layer_norm,
    torch.softmax,
    torch.log_softmax,
    torch.layer_norm,
    Tensor.softmax,
    Tensor.log_softmax,
}
"""What the models call that autocast computes in float32 on GPUs, but not on CPUs."""


class AsOnCuda(TorchFunctionMode):
    """Lets CPU tensors take the ways that CUDA tensors take, as far as memory is concerned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        if func is functional.dropout:
            return _dropout(func, *args, **kwargs)
        if func in SOFTMAX and torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
        return func(*args, **kwargs)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    # With dropout the CPU would keep the weights; a fused kernel draws the same numbers again.
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(dtype) for t in (query, key, value))
    fused: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = fused(query, key, value, scale=scale)[0]
    return output


def _dropout(
    plain: Callable[..., Tensor],
    tokens: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    if inplace or not training or p in (0, 1):
        return plain(tokens, p, training, inplace)
    dropped: Tensor = torch.native_dropout(tokens, p, training)[0]
    return dropped


class MemoryMeter(TorchDispatchMode):
    """Adds up the bytes of all storages that live, by kind, and keeps the peak.

    A storage that an operator makes has the kind ``making``; `mark` changes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.making = "activations"
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known: dict[int, tuple[str, int]] = {}

    def mark(self, tensor: Tensor, kind: str) -> None:
        """Makes a tensor's storage of a kind, whether it was known or not."""
        storage = tensor.untyped_storage()
        number = storage._cdata
        if number in self._known:
            old, size = self._known[number]
            self.live[old] -= size
        else:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            weakref.finalize(storage, self._forget, number)
        self._known[number] = kind, size
        self.live[kind] += size
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def restart(self) -> None:
        """Forgets the peak so far."""
        self.peak = self.live.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self.mark(tensor, self.making)
        return result

    def _forget(self, number: int) -> None:
        kind, size = self._known.pop(number)
        self.live[kind] -= size


def peak_memory(run: Run, size: Size) -> tuple[Counter[str], int]:
    """Bytes at the peak of an update, by the kinds of `KINDS`, and how many parameters it updates.

    Activations are what forward passes make, the batch included; temporary is what lives at that
    moment of a backward pass or an update, but gradients of parameters.
    """
    with torch.device("meta"):
        model = build(run, size)
    with FakeTensorMode():
        _make_fake(model)
        training = Training(model, run, size)
        meter = MemoryMeter()
        for tensor in (*training.model.parameters(), *training.model.buffers()):
            meter.mark(tensor, "parameters")
        for tensor in training.batch:
            meter.mark(tensor, "activations")
        for parameter in training.updated:
            parameter.register_post_accumulate_grad_hook(lambda p: meter.mark(p.grad, "gradients"))
        for _ in range(2):
            meter.restart()
            _step(training, meter)
            for state in training.optimizer.state.values():
                for tensor in state.values():
                    meter.mark(tensor, "optimiser states")
        return meter.peak, sum(p.numel() for p in training.updated)


def _make_fake(model: nn.Module) -> None:
    """Replaces tensors on the meta device, for which autocast has no rules, by fake CPU ones."""
    fakes: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if tensor not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    fakes[tensor] = (
                        nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                    )
                own[name] = fakes[tensor]  # type: ignore[assignment]


def _step(training: Training, meter: MemoryMeter) -> None:
    """One update, as `Training.step` does it."""
    with meter:
        meter.making = "activations"
        with AsOnCuda():
            loss = training.loss()
        meter.making = "temporary"
        loss.backward()
        del loss
        training.optimizer.step()
        training.optimizer.zero_grad()


def memory_row(run: Run, size: Size) -> Row:
    """The row of a run."""
    peak, updated = peak_memory(run, size)
    split = {kind: rounded(peak[kind] / 2**30) for kind in KINDS}
    whole = rounded(peak.total() / 2**30)
    return {"suite": "memory", **about(run, size), "updated": updated, "peak_gib": whole, **split}
