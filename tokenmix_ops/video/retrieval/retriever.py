"""BLIP's retrieval model for videos."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import BlipForImageTextRetrieval

from tokenmix_ops.video.blip import TaskName
from tokenmix_ops.video.cross_attention import CrossAttention, VideoMemory, share_video_keys
from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.tuning.spec import Tuning


class EncodedVideos(NamedTuple):
    """Videos for both heads: ``embedding`` [batch, 256], ``tokens`` [batch, T * S, dim]."""

    embedding: Tensor
    tokens: Tensor


class VideoRetriever(nn.Module):
    """Embeds videos and texts in one space, and matches pairs by cross-attention.

    Reuses the modules of ``model`` under their names, except for the tower, which becomes
    ``encoder.vision_model``. No layer mixes tokens until you call `tuning.apply`. Source: Token
    Mixing (AAAI 2023); BLIP.

    Args:
        model: a BLIP retrieval model, converted in place.
        num_frames: frames per video.
        enc_token_id: id of [ENC]; None means the last id of the vocabulary, as in BLIP.
    """

    task: ClassVar[TaskName] = "retrieval"
    blip_class = BlipForImageTextRetrieval
    called_in_parts = ("text_encoder",)
    """`remember` computes keys and values outside the layers' own calls."""

    def __init__(
        self,
        model: BlipForImageTextRetrieval,
        *,
        num_frames: int = 8,
        enc_token_id: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, BlipForImageTextRetrieval):
            raise ValueError(
                f"model must be a BlipForImageTextRetrieval, got {type(model).__name__}"
            )
        vocabulary = model.text_encoder.config.vocab_size
        self.enc_token_id = vocabulary - 1 if enc_token_id is None else enc_token_id
        if not 0 <= self.enc_token_id < vocabulary:
            raise ValueError(
                f"enc_token_id must be one of the {vocabulary} tokens, got {enc_token_id}"
            )
        self.encoder = VideoEncoder(model.vision_model, num_frames=num_frames, mixing_layers=())
        self.text_encoder = model.text_encoder
        self.vision_proj = model.vision_proj
        self.text_proj = model.text_proj
        self.itm_head = model.itm_head
        share_video_keys(self.text_encoder)
        self.blip_config: Any = model.config
        self.tuning: Tuning | None = None

    def heads(self) -> list[nn.Parameter]:
        """The projection and matching heads, which take the place of the language head (LH)."""
        parts = (self.vision_proj, self.text_proj, self.itm_head)
        return [parameter for part in parts for parameter in part.parameters()]

    def embed_videos(self, pixels: Tensor) -> Tensor:
        """Embed videos [batch, T, 3, H, W] as unit vectors [batch, 256].

        The last layer computes only the [CLS] rows.
        """
        return self._embed_frames(self.encoder(pixels, queries="prefix").tokens[:, :, 0])

    def encode_videos(self, pixels: Tensor) -> EncodedVideos:
        """Return the result of `embed_videos` and, from the same pass, the tokens for `match`."""
        tokens = self.encoder(pixels).tokens
        return EncodedVideos(self._embed_frames(tokens[:, :, 0]), tokens.flatten(1, 2))

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed texts [n, length] that start with [CLS] as unit vectors [n, 256]."""
        hidden = self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        return _unit(self.text_proj(hidden[:, 0]))

    def remember(self, tokens: Tensor) -> VideoMemory:
        """Build a memory of video tokens [videos, T * S, dim] with every layer's keys and values.

        It computes them ahead of the first text's pass, because gradient checkpointing runs a layer
        twice and both runs must see the same tensors.
        """
        memory = VideoMemory(tokens)
        for layer in self.text_encoder.modules():
            if isinstance(layer, CrossAttention):
                memory.of(layer)
        return memory

    def match(self, input_ids: Tensor, attention_mask: Tensor, memory: VideoMemory) -> Tensor:
        """Return logits [videos * n, 2] for "no" and "yes": whether each text matches its video.

        ``input_ids`` [videos * n, length]: n texts per video, grouped by video; [ENC] replaces
        their first token.
        """
        first = torch.full_like(input_ids[:, :1], self.enc_token_id)
        hidden = self.text_encoder(
            torch.cat([first, input_ids[:, 1:]], dim=1),
            attention_mask=attention_mask,
            encoder_hidden_states=memory,
        ).last_hidden_state
        return self.itm_head(hidden[:, 0])

    def _embed_frames(self, cls_tokens: Tensor) -> Tensor:
        """Map [batch, T, dim] to [batch, 256]: project each frame, then average."""
        return _unit(self.vision_proj(cls_tokens).mean(dim=1))


def _unit(features: Tensor) -> Tensor:
    # Use float32: dividing similarities by a small temperature magnifies rounding errors.
    return normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
