"""Projections of tokens to queries, keys and values, computed only for the tokens in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tokenmix_ops.torch_internals import is_plain_linear


class Projection(Protocol):
    """Turns tokens into queries, keys and values, using parameters of a module."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the module's attributes that the projection uses."""
        ...

    def __call__(
        self, module: nn.Module, tokens: Tensor, num_queries: int, selected: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projects tokens [batch, num_frames, num_tokens, dim].

        The query covers the first ``num_queries`` tokens of each frame. Key and value cover the
        tokens with the flat indices ``selected``, [batch, num_keys, features], or all tokens,
        [batch, num_frames, num_tokens, features].
        """
        ...


@dataclass(frozen=True)
class PackedProjection:
    """A child module whose output holds query, key and value side by side."""

    child: str = "qkv"

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.child,)

    def __call__(
        self, module: nn.Module, tokens: Tensor, num_queries: int, selected: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv: Any = module.get_submodule(self.child)
        all_queries = num_queries == tokens.shape[2]
        if (all_queries and selected is None) or not is_plain_linear(qkv):
            # Calls a wrapped projection (LoRA, quantised, hooked) as it is, on all tokens.
            query, key, value = qkv(tokens).chunk(3, dim=-1)
            return query[:, :, :num_queries], key, value
        return _packed(qkv.weight, qkv.bias, tokens, num_queries, selected)


@dataclass(frozen=True)
class PackedParameters:
    """A weight [3 * dim, dim] and a bias of the module itself, as in nn.MultiheadAttention."""

    weight: str = "in_proj_weight"
    bias: str = "in_proj_bias"

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.weight, self.bias)

    def __call__(
        self, module: nn.Module, tokens: Tensor, num_queries: int, selected: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = getattr(module, self.weight), getattr(module, self.bias)
        if num_queries == tokens.shape[2] and selected is None:
            query, key, value = linear(tokens, weight, bias).chunk(3, dim=-1)
            return query, key, value
        return _packed(weight, bias, tokens, num_queries, selected)


@dataclass(frozen=True)
class SeparateProjections:
    """Three child modules, one each for query, key and value."""

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def __call__(
        self, module: nn.Module, tokens: Tensor, num_queries: int, selected: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        sources = _sources(tokens, selected)
        return (
            module.get_submodule(self.query)(_leading(tokens, num_queries)),
            module.get_submodule(self.key)(sources),
            module.get_submodule(self.value)(sources),
        )


def _packed(
    weight: Tensor, bias: Tensor | None, tokens: Tensor, num_queries: int, selected: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [weight.shape[0] // 3, weight.shape[0] // 3 * 2]
    query_weight, key_value_weight = torch.split(weight, sizes)
    query_bias, key_value_bias = (None, None) if bias is None else torch.split(bias, sizes)
    query = linear(_leading(tokens, num_queries), query_weight, query_bias)
    key, value = linear(_sources(tokens, selected), key_value_weight, key_value_bias).chunk(
        2, dim=-1
    )
    return query, key, value


def _leading(tokens: Tensor, num_queries: int) -> Tensor:
    return tokens if num_queries == tokens.shape[2] else tokens[:, :, :num_queries]


def _sources(tokens: Tensor, selected: Tensor | None) -> Tensor:
    return tokens if selected is None else tokens.flatten(1, 2).index_select(1, selected)
