"""Why there is no GPU to measure on, in a user's words."""

import warnings

import pytest
import torch

from bench.no_gpu import why_no_gpu

OLD = "CUDA initialization: The NVIDIA driver on your system is too old\n (found version 11040)."


def too_old():
    warnings.warn(OLD, stacklevel=1)
    return False


@pytest.mark.parametrize(
    ("available", "cuda", "why"),
    [
        (lambda: True, "13.0", None),
        (lambda: False, None, f"PyTorch {torch.__version__} was built without CUDA"),
        (lambda: False, "13.0", "PyTorch finds none"),
        (too_old, "13.0", f"PyTorch finds none: {OLD.replace(chr(10), '')}"),
    ],
    ids=["a GPU", "a build for CPUs", "no GPU", "an old driver"],
)
def test_the_reason_is_named(available, cuda, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert why_no_gpu() == (why and f"needs a CUDA GPU, and {why}")
