"""Video captioning: BLIP's text decoder over the tokens of all frames of a video."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BlipForConditionalGeneration

from tokenmix_ops.video.blip import TaskName
from tokenmix_ops.video.cross_attention import VideoMemory, share_video_keys
from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.tuning.spec import Tuning

IGNORED = -100


class VideoCaptioner(nn.Module):
    """Captions videos with a BLIP captioner whose vision tower runs over all frames.

    No layer mixes tokens until you call `tuning.apply`.
    Source: Token Mixing (AAAI 2023), "Video captioning": the decoder's cross-attention reads the
    flattened tokens of all frames.

    Args:
        model: transformers' BLIP captioner, converted in place.
        num_frames: frames per video.
    """

    task: ClassVar[TaskName] = "captioning"
    blip_class = BlipForConditionalGeneration

    def __init__(
        self,
        model: BlipForConditionalGeneration,
        *,
        num_frames: int = 8,
    ) -> None:
        super().__init__()
        self.encoder = VideoEncoder(model.vision_model, num_frames=num_frames, mixing_layers=())
        self.text_decoder: Any = model.text_decoder
        share_video_keys(self.text_decoder)
        self.blip_config: Any = model.config
        self.tuning: Tuning | None = None

    def heads(self) -> list[nn.Parameter]:
        """The language head (LH): its transform and the vocabulary biases.

        The vocabulary matrix is tied to the word embeddings and belongs to the frozen decoder.
        """
        predictions = self.text_decoder.cls.predictions
        return [*predictions.transform.parameters(), predictions.bias]

    def encode(self, pixels: Tensor) -> VideoMemory:
        """Encode normalised videos [batch, num_frames, 3, height, width] for the decoder."""
        return VideoMemory(self.encoder(pixels).tokens.flatten(1, 2))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean language-model loss over one caption per video.

        ``pixels`` [batch, num_frames, 3, height, width]; ``input_ids`` int64 [batch, length],
        [DEC] first; ``attention_mask`` [batch, length], 0 for padding, which the loss ignores.
        The decoder's configuration sets the label smoothing (BLIP: 0.1).
        """
        if input_ids.shape != attention_mask.shape or input_ids.shape[0] != pixels.shape[0]:
            raise ValueError(
                "expected input_ids and attention_mask [batch, length] for pixels [batch, ...], "
                f"got {list(input_ids.shape)}, {list(attention_mask.shape)}, {list(pixels.shape)}"
            )
        # Pass tokens, not a VideoMemory: gradient checkpointing runs a layer twice, and the second
        # run must recompute the keys.
        logits = self.text_decoder(
            input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=self.encoder(pixels).tokens.flatten(1, 2),
            use_cache=False,
        ).logits[:, :-1]
        targets = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, IGNORED)
        return cross_entropy(
            logits.flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.text_decoder.label_smoothing,
        )

    @torch.no_grad()
    def generate(
        self,
        videos: Tensor | VideoMemory,
        *,
        num_beams: int = 3,
        min_length: int = 5,
        max_length: int = 32,
        top_p: float | None = None,
        num_captions: int = 1,
        **other: Any,
    ) -> Tensor:
        """Return caption token ids [batch * num_captions, length], [DEC] first, padded.

        Uses beam search, or nucleus sampling if ``top_p`` is given. Each layer computes a video's
        keys and values once, regardless of beams, captions and steps.

        Args:
            videos: normalised pixels [batch, num_frames, 3, height, width], or the result of
                `encode`.
            num_beams: beam width; 3 for MSVD as in BLIP, 5 otherwise.
            min_length: minimum number of tokens before [SEP], [DEC] included.
            max_length: maximum number of tokens, [DEC] and [SEP] included.
            top_p: sample from the smallest set of tokens with at least this probability.
            num_captions: captions per video; at most ``num_beams`` with beam search.
            other: further arguments of transformers' ``generate``, such as ``repetition_penalty``.
        """
        memory = videos if isinstance(videos, VideoMemory) else self.encode(videos)
        text = self.blip_config.text_config
        start = torch.full(
            (memory.num_videos, 1),
            text.bos_token_id,
            dtype=torch.int64,
            device=memory.tokens.device,
        )
        strategy = (
            dict(num_beams=num_beams)
            if top_p is None
            else dict(do_sample=True, top_p=top_p, top_k=0, num_beams=1)
        )
        generated: Tensor = self.text_decoder.generate(
            start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=memory,
            min_length=min_length,
            max_length=max_length,
            num_return_sequences=num_captions,
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            **strategy,
            **other,
        )
        return generated
