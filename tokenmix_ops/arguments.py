"""What a third-party model passes to a layer of this package, besides the tokens.

Other libraries rename and add arguments. A layer that stands in one of their models takes them all:
it ignores what cannot change its result, such as a cache or a flag, and refuses what could.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def refuse_others(
    layer: str, tokens: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raises ValueError, naming the ``layer``, for arguments that could change its result.

    Those are all tensors but ``tokens`` itself, for each may be a mask, other keys, or position
    embeddings; and ``is_causal``.
    """
    given = [name for name, value in kwargs.items() if _holds_tensor(value, tokens)]
    given += ["is_causal"] * (kwargs.get("is_causal") is True)
    given += ["a second tensor" for value in args if _holds_tensor(value, tokens)]
    if given:
        raise ValueError(
            f"{layer} takes no attention mask and no other keys, got {', '.join(given)}"
        )


def _holds_tensor(value: Any, tokens: Tensor) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    values = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(v, Tensor) and v is not tokens for v in values)
