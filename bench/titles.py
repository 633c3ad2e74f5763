"""What tables call the contenders."""

from __future__ import annotations

from tokenmix_ops.peer_layers import LAYER_TITLES
from tokenmix_ops.peers import OPERATOR_TITLES

PRODUCTS = {
    "product": "one float32 matrix product of as many operations",
    "own_products": "its two products alone in float32, torch.bmm",
}
TOWERS = {
    "transformers": "transformers' own",
    "last_mixes": "released in the last layer",
    "converted_eager": "spatial in 11 layers, released in the last, eager",
    "converted": "spatial in 11 layers, released in the last",
    "all_spatial": "spatial in all layers",
}
TITLES = {**OPERATOR_TITLES, **LAYER_TITLES, **PRODUCTS, **TOWERS}


def contender_title(contender: str) -> str:
    return TITLES.get(contender, contender)


def short(contender: str) -> str:
    """A contender's title where what it does with keys is clear."""
    return contender_title(contender).removeprefix("gather + SDPA, ").removeprefix("gather + ")
