"""What tests of the Triton kernels share; left out, and said so, where Triton is missing."""

import os
import traceback
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from forgetting import forget

MISSING = find_spec("triton") is None
collect_ignore_glob = ["test_triton*.py"] if MISSING else []


def pytest_report_header():
    return ["left out: tests/backends/test_triton*.py, no triton"] if MISSING else []


@pytest.fixture(autouse=True)
def _gpu_still_works():
    """Ends a process whose GPU a test has broken, because all its later tests would fail; gives
    other processes the memory that tests no longer use."""
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            traceback.print_exc()
            os._exit(1)
        torch.cuda.empty_cache()


@pytest.fixture
def launch_by():
    """Replaces the launch configurations of this machine for one test, by a function of them."""
    from tokenmix_ops.backends import triton
    from tokenmix_ops.backends.triton import configs, launch

    with ExitStack() as until_the_end:

        def change(function):
            own = launch.architecture(torch.device("cpu" if triton.interpreted() else "cuda"))
            changed = replace(own, configs=function(own.configs))
            until_the_end.enter_context(configs.replaced(changed))
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
