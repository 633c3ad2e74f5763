"""The momentum copy of a retriever, which computes the queue's features and soft targets."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tokenmix_ops.video.retrieval.retriever import VideoRetriever


class MomentumCopy(nn.Module):
    """An exponential moving average of a retriever, for embeddings.

    Copies only trained parameters (``names``) and shares frozen parameters and buffers with the
    retriever, so set ``requires_grad`` first. Omits the cross-attention and the matching head,
    which embeddings do not use. State dicts hold only the copies. As in BLIP, the copy follows
    ``train`` and ``eval``, so dropout is active in it during training.

    Args:
        retriever: the model to average.
        momentum: weight of the old average at each update; the paper uses 0.995.
    """

    def __init__(self, retriever: VideoRetriever, momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
        self.momentum = momentum
        self.names = tuple(
            name
            for name, parameter in retriever.named_parameters()
            if parameter.requires_grad and not _serves_matching_only(name)
        )
        copied = {id(retriever.get_parameter(name)) for name in self.names}
        everything: list[Tensor] = [*retriever.parameters(), *retriever.buffers()]
        shared = {id(tensor): tensor for tensor in everything if id(tensor) not in copied}
        self.model = copy.deepcopy(retriever, shared)
        del self.model.itm_head
        for module in self.model.text_encoder.modules():
            if hasattr(module, "crossattention"):
                del module.crossattention
        for name in self.names:
            self.model.get_parameter(name).requires_grad_(False)
        self.register_state_dict_post_hook(_leave_out_shared)
        self.register_load_state_dict_pre_hook(_put_back_shared)

    @torch.no_grad()
    def update(self, retriever: VideoRetriever) -> None:
        """Move the copies towards the retriever; call it after every optimiser step."""
        if self.names:
            average = get_ema_multi_avg_fn(self.momentum)
            copies = [self.model.get_parameter(name) for name in self.names]
            average(copies, [retriever.get_parameter(name) for name in self.names], 0)


def _serves_matching_only(name: str) -> bool:
    return name.startswith("itm_head.") or ".crossattention." in name


def _leave_out_shared(
    module: MomentumCopy, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    kept = {f"{prefix}model.{name}" for name in module.names}
    for name in [name for name in state_dict if name.startswith(prefix) and name not in kept]:
        del state_dict[name]


def _put_back_shared(
    module: MomentumCopy, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    copied = {f"{prefix}model.{name}" for name in module.names}
    for name, tensor in module.model.state_dict(prefix=f"{prefix}model.").items():
        # The retriever has already loaded shared tensors; loading one onto itself changes nothing.
        if name not in copied:
            state_dict.setdefault(name, tensor)
