"""What tests of the Triton kernels share; left out, and said so, where Triton is missing."""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from forgetting import forget

MISSING = find_spec("triton") is None
collect_ignore = ["test_triton.py", "test_triton_gpu.py"] if MISSING else []


def pytest_report_header():
    return ["left out: tests/backends/test_triton*.py, no triton"] if MISSING else []


@pytest.fixture
def launch_by(monkeypatch):
    """Replaces the launch configurations of this machine for one test, by a function of them."""
    from tokenmix_ops.backends import triton
    from tokenmix_ops.backends.triton import configs, launch

    def change(function):
        device = torch.device("cpu" if triton.interpreted() else "cuda")
        own = launch.architecture(device)
        monkeypatch.setattr(configs, "load", lambda _: replace(own, configs=function(own.configs)))
        forget(launch)

    yield change
    forget(launch)


@pytest.fixture(params=["resident", "streamed"])
def algorithm(request, launch_by):
    """Which kernels compute: those that hold all keys, wherever they can, or never those."""

    def streamed(own):
        return tuple(c for c in own if not c.kernel.endswith("resident"))

    def resident(own):
        # However few the programs are.
        return tuple(
            replace(c, programs_per_sm=0) if c.kernel == "bwd_resident" else c for c in own
        )

    launch_by({"resident": resident, "streamed": streamed}[request.param])
    return request.param


@pytest.fixture
def ran(monkeypatch):
    """The names of the kernels that run, each once for a kind of call."""
    from tokenmix_ops.backends.triton import launch

    names = []
    for name, kernel in launch.KERNELS.items():
        note = partial(lambda name, *_, **__: names.append(name), name)
        monkeypatch.setattr(kernel, "pre_run_hooks", [note])
    forget(launch)
    return names
