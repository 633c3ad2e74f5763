"""Why PyTorch cannot use a GPU."""

from __future__ import annotations

import warnings

import torch


def why_no_gpu() -> str | None:
    """A sentence's end that says why there is no CUDA GPU to measure on; None if there is one."""
    with warnings.catch_warnings(record=True) as told:
        # The reason is a warning of PyTorch's, a driver that is too old for example.
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None:
        return f"needs a CUDA GPU, and PyTorch {torch.__version__} was built without CUDA"
    reasons = [" ".join(str(warning.message).split()) for warning in told]
    return ": ".join(["needs a CUDA GPU, and PyTorch finds none", *reasons[:1]])
