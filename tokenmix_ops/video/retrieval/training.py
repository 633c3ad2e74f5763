"""Retriever training: both losses, and the state kept between steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tokenmix_ops.video.retrieval.contrastive import FeatureQueue, Features, contrastive_loss
from tokenmix_ops.video.retrieval.gathering import GlobalBatch
from tokenmix_ops.video.retrieval.matching import Negatives, draw_negatives, matching_loss
from tokenmix_ops.video.retrieval.momentum import MomentumCopy
from tokenmix_ops.video.retrieval.retriever import VideoRetriever

TEMPERATURES = 0.001, 0.5
"""Bounds of the learnt temperature."""


class RetrievalTraining(nn.Module):
    """A retriever with its losses: contrastive (ITC) and matching (ITM) with hard negatives.

    Its state dict suffices to resume and stores nothing twice. All processes must start
    with the same queue and momentum copy, which then stay in sync. Source: BLIP's retrieval; the
    paper's recipe.

    Args:
        retriever: the model to train, with ``requires_grad`` already set.
        queue_size: pairs in the queue.
        momentum: momentum of the `MomentumCopy`.
        alpha: weight of the soft targets, ramped up linearly over the first epoch.
        temperature: initial value; it is learnt.
        seed: seed for drawing negatives.

    Raises ValueError for numbers out of range.
    """

    def __init__(
        self,
        retriever: VideoRetriever,
        *,
        queue_size: int = 57_600,
        momentum: float = 0.995,
        alpha: float = 0.4,
        temperature: float = 0.07,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
        low, high = TEMPERATURES
        if not low <= temperature <= high:
            raise ValueError(f"temperature must be between {low} and {high}, got {temperature}")
        self.retriever = retriever
        self.momentum_copy = MomentumCopy(retriever, momentum)
        self.queue = FeatureQueue(queue_size, retriever.text_proj.out_features)
        # One-dimensional, because FSDP rejects scalar parameters.
        self.temperature = nn.Parameter(torch.full((1,), temperature))
        self.alpha = alpha
        self.seed = seed
        self._everyone: GlobalBatch | None = None
        # Not a buffer: reading it from a GPU would synchronise at every step.
        self._draws = torch.zeros(1, dtype=torch.int64)

    def forward(self, batch: Mapping[str, Tensor], epoch: float) -> dict[str, Tensor]:
        """Return mean losses over this process's pairs: "loss", the sum of "itc" and "itm", which
        are detached; also "temperature".

        ``batch``: "pixels" [n, T, 3, H, W]; "input_ids" and "attention_mask" [n, length], texts
        that start with [CLS]; "videos" int64 [n], the id of each pair's video, at least 0.
        ``epoch``: epochs done so far. Negatives and queue use the pairs of all processes. Raises
        ValueError unless all processes have equally many pairs at every step, with texts padded to
        one length.
        """
        temperature = self.temperature.clamp(*TEMPERATURES)
        input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        everyone = self._global(input_ids)

        embedding, tokens = self.retriever.encode_videos(batch["pixels"])
        texts = self.retriever.embed_texts(input_ids, attention_mask)
        own = Features(embedding, texts, batch["videos"])
        current, followers = self._gathered(own, self._follow(batch), everyone)

        alpha = self.alpha * min(1.0, epoch)
        columns = self.queue.behind(followers)
        itc = contrastive_loss(own, followers.rows(everyone.own), columns, temperature, alpha)
        self.queue.enqueue(followers)

        negatives = self._negatives(current, temperature)
        itm = self._match(input_ids, attention_mask, tokens, negatives, everyone)
        return {
            "loss": itc + itm,
            "itc": itc.detach(),
            "itm": itm.detach(),
            "temperature": temperature.detach()[0],
        }

    @torch.no_grad()
    def after_update(self) -> None:
        """Clamp the temperature and update the momentum copy; call after every optimiser step."""
        # Not in forward: with FSDP, parameters are temporary copies there.
        self.temperature.clamp_(*TEMPERATURES)
        self.momentum_copy.update(self.retriever)

    def _global(self, input_ids: Tensor) -> GlobalBatch:
        """Return the global batch; queries all processes only at the first step, because that
        synchronises with the device."""
        pairs, length = input_ids.shape
        known = self._everyone
        if known is None or len(known.sizes) == 1:
            known = GlobalBatch.around(pairs, length, input_ids.device)
            if len({*zip(known.sizes, known.lengths, strict=True)}) > 1:
                raise ValueError(
                    "all processes must have equally many pairs, with texts padded to one length, "
                    f"got {known.sizes} pairs of {known.lengths} tokens"
                )
            self._everyone = known
        elif (pairs, length) != (known.sizes[0], known.lengths[0]):
            raise ValueError(
                f"with several processes, all batches must match the first: expected "
                f"{known.sizes[0]} pairs of {known.lengths[0]} tokens, got {pairs} of {length}"
            )
        return known

    @torch.no_grad()
    def _follow(self, batch: Mapping[str, Tensor]) -> Features:
        follower = self.momentum_copy.model
        video = follower.embed_videos(batch["pixels"])
        text = follower.embed_texts(batch["input_ids"], batch["attention_mask"])
        return Features(video, text, batch["videos"])

    def _gathered(
        self, own: Features, followers: Features, everyone: GlobalBatch
    ) -> tuple[Features, Features]:
        """Gather both for the pairs of all processes, without gradients."""
        stacked = torch.stack([own.video, own.text, followers.video, followers.text], dim=1)
        parts = everyone.gather(stacked).unbind(dim=1)
        ids = everyone.gather(own.ids)
        return Features(parts[0], parts[1], ids), Features(parts[2], parts[3], ids)

    def _negatives(self, features: Features, temperature: Tensor) -> Negatives:
        """Draw the next negatives from the pairs of all processes."""
        # Leave room for 2^20 draws per seed, so that runs with adjacent seeds do not overlap.
        generator = torch.Generator().manual_seed((self.seed << 20) + int(self._draws))
        self._draws += 1
        return draw_negatives(features, temperature, generator)

    def _match(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tokens: Tensor,
        negatives: Negatives,
        everyone: GlobalBatch,
    ) -> Tensor:
        """The matching loss of own pairs, own videos with wrong texts, and own texts with wrong
        videos."""
        texts, videos = negatives.texts[everyone.own], negatives.videos[everyone.own]

        def with_wrong(rows: Tensor) -> Tensor:
            """Interleave each pair's own text with its wrong one, grouped by video."""
            return torch.stack([rows, everyone.gather(rows)[texts]], dim=1).flatten(0, 1)

        memory = self.retriever.remember(tokens)
        both = self.retriever.match(with_wrong(input_ids), with_wrong(attention_mask), memory)
        right, wrong_text = both.unflatten(0, (-1, 2)).unbind(dim=1)
        if len(everyone.sizes) == 1:
            others = memory.select(videos)
        else:
            others = self.retriever.remember(everyone.gather_with_gradient(tokens)[videos])
        wrong_video = self.retriever.match(input_ids, attention_mask, others)
        return matching_loss(right, torch.cat([wrong_text, wrong_video]), negatives.exist)

    def get_extra_state(self) -> Tensor:
        """Return the number of draws so far; not a copy, like the parameters in a state dict."""
        return self._draws

    def set_extra_state(self, state: Tensor) -> None:
        self._draws.copy_(state)
