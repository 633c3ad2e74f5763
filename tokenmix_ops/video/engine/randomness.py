"""The state of PyTorch's random generators: of the CPU, and of the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that a model on the device draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_state(device: torch.device, states: Mapping[str, Tensor]) -> None:
    """Sets the generators to states that ``random_state`` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"], device)


@contextmanager
def unmoved(device: torch.device) -> Iterator[None]:
    """Restores the RNG state on exit, so that evaluating does not change the training."""
    states = random_state(device)
    try:
        yield
    finally:
        set_random_state(device, states)
