"""What all tests run under."""

import os

# A worker has one core, and so have the programs that it starts; more threads only fight. NumPy
# computes the interpreted kernels, and reads its variable when PyTorch imports it.
if os.environ.get("PYTEST_XDIST_WORKER"):
    for library in ("OMP", "MKL", "OPENBLAS"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without it cuBLAS refuses to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Without a GPU the Triton kernels run under Triton's interpreter; it is asked for before an import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "project",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every new allocation full of NaN, so that what is not written shows.

    PyTorch does so in its deterministic mode; on GPUs some of its operators only warn in that.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _forgotten_calls():
    """No test finds what a call of another test has chosen: tests change what backends answer."""
    from tokenmix_ops import functional

    functional.forget_calls()


@pytest.fixture(params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request):
    return request.param


@pytest.fixture
def assert_says():
    """Checks that a call raises ValueError with exactly this text."""

    def check(call, text):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == text

    return check
