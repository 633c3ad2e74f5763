"""Training of a retriever: both losses, and what has to be kept from step to step."""

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
"""What the learnt temperature is kept between."""


class RetrievalTraining(nn.Module):
    """A retriever with its losses: contrastive (ITC) and matching (ITM) with hard negatives.

    Its state dict is all that is needed to go on, and holds nothing twice. All processes must have
    the same queue and momentum copy, which they keep by themselves. Source: BLIP's retrieval;
    recipe of the paper.

    Args:
        retriever: with ``requires_grad`` set as it is to be trained.
        queue_size: pairs in the queue.
        momentum: of the `MomentumCopy`.
        alpha: share of soft targets, reached linearly over the first epoch.
        temperature: the first one; it is learnt.
        seed: of the draws of negatives.

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
        # Of one dimension, since sharded training takes no scalars.
        self.temperature = nn.Parameter(torch.full((1,), temperature))
        self.alpha = alpha
        self.seed = seed
        self._everyone: GlobalBatch | None = None
        # Not a buffer: on a GPU, reading it would wait for all work at every step.
        self._draws = torch.zeros(1, dtype=torch.int64)

    def forward(self, batch: Mapping[str, Tensor], epoch: float) -> dict[str, Tensor]:
        """Mean losses over this process's pairs: "loss" is the sum of "itc" and "itm", which show
        how it is made up and carry no gradient; also "temperature".

        ``batch``: "pixels" [n, T, 3, H, W]; "input_ids" and "attention_mask" [n, length], texts
        that start with [CLS]; "videos" int64 [n], the number of each pair's video, at least 0.
        ``epoch`` is how many are done. Negatives and queue are of all processes' pairs, and all
        processes have as many at every step, with texts padded to one length. Raises ValueError if
        they have not.
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
        """Keeps the temperature in its range and moves the momentum copy; to be called after every
        optimiser update."""
        # Not in forward: sharded training has no more than a passing copy there.
        self.temperature.clamp_(*TEMPERATURES)
        self.momentum_copy.update(self.retriever)

    def _global(self, input_ids: Tensor) -> GlobalBatch:
        """The batch of all processes. They are asked at the first step alone, because it waits for
        the device."""
        pairs, length = input_ids.shape
        known = self._everyone
        if known is None or len(known.sizes) == 1:
            known = GlobalBatch.around(pairs, length, input_ids.device)
            if len({*zip(known.sizes, known.lengths, strict=True)}) > 1:
                raise ValueError(
                    "all processes must have as many pairs, with texts padded to one length; got "
                    f"{known.sizes} pairs of {known.lengths} tokens"
                )
            self._everyone = known
        elif (pairs, length) != (known.sizes[0], known.lengths[0]):
            raise ValueError(
                f"with several processes, all batches must be as the first, {known.sizes[0]} pairs "
                f"with texts padded to {known.lengths[0]} tokens; got {pairs} of {length}"
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
        """The same of all processes' pairs, without gradients."""
        stacked = torch.stack([own.video, own.text, followers.video, followers.text], dim=1)
        parts = everyone.gather(stacked).unbind(dim=1)
        ids = everyone.gather(own.ids)
        return Features(parts[0], parts[1], ids), Features(parts[2], parts[3], ids)

    def _negatives(self, features: Features, temperature: Tensor) -> Negatives:
        """The next draw, of all processes' pairs."""
        # Seeds of neighbouring draws and runs must not meet: 2^20 draws a seed.
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
        """The matching loss of each own pair, its video with a wrong text, its text with a wrong
        video."""
        texts, videos = negatives.texts[everyone.own], negatives.videos[everyone.own]

        def with_wrong(rows: Tensor) -> Tensor:
            """Each pair's own text, then its wrong one: those of a video in a row."""
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
        """How often negatives were drawn: the number itself, as parameters are given out too."""
        return self._draws

    def set_extra_state(self, state: Tensor) -> None:
        self._draws.copy_(state)
