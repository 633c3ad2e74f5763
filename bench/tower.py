"""A whole vision tower at inference: BLIP's ViT-B/16 as transformers computes it, and converted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.passes import Contender, Part, failure, fault, race, relative_errors, rows_of
from bench.rows import Row
from tokenmix_ops.convert import mix_tokens
from tokenmix_ops.peers import KERNELS
from tokenmix_ops.timing import Clock
from tokenmix_ops.video.blip import blip_vision_config

NUM_FRAMES = 8
Conversion = Mapping[str, Sequence[int] | str]
"""By the name of a mixing, the layers that get it."""


def conversions(num_layers: int, kernel: str) -> dict[str, tuple[Conversion, str]]:
    """The layers of each converted contender, and their backend."""
    mixes = {"released": [num_layers - 1]}
    both = {"spatial": range(num_layers - 1), **mixes}
    return {
        "last_mixes": (mixes, kernel),
        "converted_eager": (both, "eager"),
        "converted": (both, kernel),
        "all_spatial": ({"spatial": "all"}, kernel),
    }


def parts(
    clock: Clock,
    device: str,
    batches: Sequence[int],
    rounds: int,
    **config: int,
) -> Iterator[tuple[str, Part]]:
    """Measurements of so many videos at once, by name; ``config`` overrides the tower's."""
    torch.manual_seed(0)
    # SDPA is never asked for: transformers' BLIP has no such path.
    with torch.device(device):
        from transformers import BlipVisionModel

        own = BlipVisionModel(blip_vision_config("vit-b16", **config)).eval()
    towers = Towers(own, device)
    for batch in batches:
        yield f"tower, B = {batch}", partial(towers.rows, clock, batch, rounds)


class Towers:
    """Towers on the same parameters; ``reasons`` names those that compute something else.

    Those that mix tokens are compared with the conversion in float64 on the eager backend, the
    others with transformers' own in float64.
    """

    def __init__(self, own: nn.Module, device: str) -> None:
        config: Any = own.config
        self.config = config
        self.device = device
        ways = conversions(config.num_hidden_layers, KERNELS[device])
        self.towers = {"transformers": own}
        self.towers |= {name: converted(own, *way) for name, way in ways.items()}
        self.errors: dict[str, dict[str, float]] = {}
        self.reasons: dict[str, str] = {}
        pixels = self._pixels(1)
        exact = deepcopy(own).double()
        mixed = converted(exact, ways["last_mixes"][0], "eager")
        with torch.no_grad():
            plain, mixes = (tokens_of(tower, pixels.double()) for tower in (exact, mixed))
        for name, tower in self.towers.items():
            alone = name in ("transformers", "all_spatial")
            compare = partial(self._compare, name, tower, plain if alone else mixes, pixels)
            if why := failure(compare) or fault(self.errors[name], torch.float32):
                self.reasons[name] = why

    def rows(self, clock: Clock, batch: int, rounds: int) -> list[Row]:
        config = self.config
        facts: Row = {
            "part": "tower",
            "shape": f"B = {batch}",
            "pass": "forward",
            "batch": batch,
            "num_frames": NUM_FRAMES,
            "image_size": config.image_size,
            "num_layers": config.num_hidden_layers,
            "dim": config.hidden_size,
            "dtype": "float32",
        }
        sets = [(self._pixels(batch),) for _ in range(2)]
        able = {
            name: Contender(partial(tokens_of, tower), sets, ())
            for name, tower in self.towers.items()
            if name not in self.reasons
        }
        result = race(able, "forward", clock, 0.0, rounds)
        return rows_of(result, facts, list(self.towers), self.reasons, self.errors)

    def _compare(self, name: str, tower: nn.Module, exact: Tensor, pixels: Tensor) -> None:
        with torch.no_grad():
            found = {"output": tokens_of(tower, pixels)}
        self.errors[name] = relative_errors(found, {"output": exact})

    def _pixels(self, batch: int) -> Tensor:
        side = self.config.image_size
        return torch.randn(batch * NUM_FRAMES, 3, side, side, device=self.device)


def converted(own: nn.Module, conversion: Conversion, backend: str) -> nn.Module:
    """A copy on the same parameters whose layers mix as told."""
    shared = {id(p): p for p in own.parameters()}
    tower = deepcopy(own, shared)
    for mixing, layers in conversion.items():
        mix_tokens(tower, NUM_FRAMES, mixing, layers, backend=backend)  # type: ignore[arg-type]
    return tower


def tokens_of(tower: nn.Module, pixels: Tensor) -> Tensor:
    tokens: Tensor = tower(pixel_values=pixels).last_hidden_state
    return tokens
