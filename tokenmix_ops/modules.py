"""Token-mixing attention as a module, which projects only the tokens in use."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tokenmix_ops.backends import check_name
from tokenmix_ops.functional import attention_weights, token_mix_attention
from tokenmix_ops.mixing import Mixing, plan_of
from tokenmix_ops.projections import PackedProjection, Projection

Queries = Literal["all", "prefix"]


class TokenMixing(nn.Module):
    """Base of all token-mixing attention layers: holds the video's layout and the mixing.

    Subclasses own the projections and call `attend`.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_frames: int,
        mixing: Mixing | str,
        num_prefix_tokens: int,
        projection: Projection,
        scale: float | None = None,
        queries: Queries = "all",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_frames(num_frames)
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens must not be negative, got {num_prefix_tokens}")
        if backend is not None:
            check_name(backend, "argument backend")
        if queries not in ("all", "prefix"):
            raise ValueError(f"queries must be 'all' or 'prefix', got {queries!r}")
        if queries == "prefix" and num_prefix_tokens < 1:
            raise ValueError("queries='prefix' needs num_prefix_tokens >= 1")
        self.num_heads = num_heads
        self.num_frames = num_frames
        self.mixing = Mixing.named(mixing)
        self.num_prefix_tokens = num_prefix_tokens
        self.qkv_projection = projection
        self.scale = scale
        self.queries: Queries = queries
        self.backend = backend

    def attend(
        self, tokens: Tensor, need_weights: bool = False, queries: Queries | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the mixed values [batch, num_frames, num_queries, num_heads * head_dim].

        ``tokens``: [batch * num_frames, num_tokens, dim] or [batch, num_frames, num_tokens, dim].
        ``queries``: which rows to compute; None keeps the module's own setting.
        With ``need_weights`` the second result holds the attention weights [batch, num_frames,
        num_heads, num_queries, num_keys].
        """
        tokens = self._as_video(tokens)
        num_tokens = tokens.shape[2]
        plan = plan_of(
            self.mixing, self.num_frames, num_tokens, self.num_prefix_tokens, tokens.device
        )
        every_row = (queries or self.queries) == "all"
        num_queries = num_tokens if every_row else self.num_prefix_tokens
        shares_few_keys = plan.rows == "shared" and plan.num_keys < self.num_frames * num_tokens
        selected = plan.key_index[0] if shares_few_keys else None
        query, key, value = (
            self._split_heads(name, projected)
            for name, projected in zip(
                ("query", "key", "value"),
                self.qkv_projection(self, tokens, num_queries, selected),
                strict=True,
            )
        )
        query, key = self.normalize_query_key(query, key)
        output = token_mix_attention(
            query, key, value, mixing=plan, scale=self.scale, backend=self.backend
        )
        weights = (
            attention_weights(query, key, mixing=plan, scale=self.scale) if need_weights else None
        )
        return output.flatten(-2), weights

    def normalize_query_key(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Override to normalise each head's queries and keys."""
        return query, key

    def extra_repr(self) -> str:
        shown = f"num_heads={self.num_heads}, num_frames={self.num_frames}, mixing={self.mixing!r}"
        return shown + f", num_prefix_tokens={self.num_prefix_tokens}"

    def _as_video(self, tokens: Tensor) -> Tensor:
        if tokens.dim() == 3 and tokens.shape[0] % self.num_frames == 0:
            batch = tokens.shape[0] // self.num_frames
            return tokens.reshape(batch, self.num_frames, *tokens.shape[1:])
        if tokens.dim() == 4 and tokens.shape[1] == self.num_frames:
            return tokens
        raise ValueError(
            "tokens must be [batch * num_frames, num_tokens, dim] or [batch, num_frames, "
            f"num_tokens, dim] with num_frames = {self.num_frames}, got {list(tokens.shape)}; "
            "tokenmix_ops.set_num_frames changes it"
        )

    def _split_heads(self, name: str, projected: Tensor) -> Tensor:
        if projected.shape[-1] % self.num_heads:
            raise ValueError(
                f"{name} has {projected.shape[-1]} features, not a multiple of num_heads = "
                f"{self.num_heads}"
            )
        return projected.unflatten(-1, (self.num_heads, -1))


class TokenMixAttention(TokenMixing):
    """Multi-head self-attention over a video in which every frame attends to mixed tokens.

    A drop-in for a ViT's attention layer: [batch * num_frames, num_tokens, dim] or [batch,
    num_frames, num_tokens, dim] in, the same shape out, and no parameters besides ``qkv`` and
    ``proj``. If all frames share one key set, only the selected tokens are projected to keys and
    values. Source: Token Mixing (AAAI 2023).

    Args:
        dim: number of features of a token, a multiple of ``num_heads``.
        num_heads: number of attention heads.
        num_frames: number of frames of a video; `set_num_frames` changes it later.
        mixing: a `Mixing` or its name.
        num_prefix_tokens: number of leading tokens of a frame that are not patches.
        qkv_bias, proj_bias: whether the projections have a bias.
        queries: "prefix" computes only the rows of the prefix tokens, [..., num_prefix_tokens,
            dim], for models that read nothing else.
        backend: name of a backend, or None for the automatic choice.

    Raises ValueError for inconsistent sizes or unknown names.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_frames: int,
        mixing: Mixing | str = "released",
        *,
        num_prefix_tokens: int = 1,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        queries: Queries = "all",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim = {dim} must be a multiple of num_heads = {num_heads}")
        super().__init__(
            num_heads=num_heads,
            num_frames=num_frames,
            mixing=mixing,
            num_prefix_tokens=num_prefix_tokens,
            projection=PackedProjection("qkv"),
            queries=queries,
            backend=backend,
        )
        self.dim = dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, need_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attends over the video; with ``need_weights`` also returns the weights of `attend`."""
        if tokens.shape[-1] != self.dim:
            raise ValueError(
                f"tokens must have dim = {self.dim} features, got {list(tokens.shape)}"
            )
        mixed, weights = self.attend(tokens, need_weights)
        output = self.proj(mixed)
        output = output.flatten(0, 1) if tokens.dim() == 3 else output
        return output if weights is None else (output, weights)


def check_frames(num_frames: int) -> None:
    """Raises ValueError unless ``num_frames`` is a positive int."""
    if type(num_frames) is not int or num_frames < 1:
        raise ValueError(f"num_frames must be a whole number, at least 1, got {num_frames!r}")


def set_num_frames(model: nn.Module, num_frames: int) -> nn.Module:
    """Sets num_frames in every token-mixing layer of ``model``; returns the model.

    Raises ValueError if num_frames < 1 or the model has no such layer.
    """
    check_frames(num_frames)
    layers = [module for module in model.modules() if isinstance(module, TokenMixing)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no token-mixing layer; call mix_tokens first")
    for layer in layers:
        layer.num_frames = num_frames
    return model
