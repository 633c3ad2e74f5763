"""Checks the extra arguments that a third-party model passes to a layer of this package.

Other libraries rename and add arguments. A layer that replaces one of theirs accepts all of them,
ignores those that cannot change its result, such as a cache or a flag, and rejects the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_ARRAYS: tuple[type, ...] = (Tensor,)
try:
    import numpy
except ModuleNotFoundError:
    pass
else:
    _ARRAYS += (numpy.ndarray,)


def refuse_others(
    layer: str, tokens: Tensor | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raises ValueError, naming the ``layer``, for arguments that could change its result.

    These are: anything with "mask" in its name that is not None; ``is_causal``; tensors and NumPy
    arrays, including those in tuples, lists and dictionaries, because each may be a mask, other
    keys, or position embeddings. The ``tokens`` may be repeated as query, key and value, by name or
    as the two arguments after the tokens, as in calls of `torch.nn.MultiheadAttention`. Pass None
    for a layer whose keys come from elsewhere.
    """
    given = [name for name, value in kwargs.items() if _could_matter(name, value, tokens)]
    others = [value for place, value in enumerate(args) if place > 1 or value is not tokens]
    given += ["a second tensor" for value in others if _holds_array(value)]
    if given:
        raise ValueError(
            f"{layer} takes no attention mask and no other keys, got {', '.join(given)}"
        )


def _could_matter(name: str, value: Any, tokens: Tensor | None) -> bool:
    if value is None or (name in ("query", "key", "value") and value is tokens):
        return False
    return "mask" in name or _holds_array(value) or (name == "is_causal" and bool(value))


def _holds_array(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return any(_holds_array(part) for part in value)
    return isinstance(value, _ARRAYS)
