"""BLIP's retrieval model over videos."""

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
    """Embeds videos and texts in one space, and matches pairs of them by cross-attention.

    It has no modules but those of ``model``, and their names but for the tower, which is
    ``encoder.vision_model``. No layer mixes until `tuning.apply` makes it so. Source: design.md,
    section 4; BLIP.

    Args:
        model: a BLIP retrieval model; its layers are changed in place.
        num_frames: frames of a video.
        enc_token_id: the token [ENC]; the last of the vocabulary, as in BLIP, if None.
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
        """The projection heads and the matching head, which stand for the language head (LH)."""
        parts = (self.vision_proj, self.text_proj, self.itm_head)
        return [parameter for part in parts for parameter in part.parameters()]

    def embed_videos(self, pixels: Tensor) -> Tensor:
        """Unit vectors [batch, 256] of videos [batch, T, 3, H, W].

        The last layer computes the [CLS] rows only.
        """
        return self._embed_frames(self.encoder(pixels, queries="prefix").tokens[:, :, 0])

    def encode_videos(self, pixels: Tensor) -> EncodedVideos:
        """What `embed_videos` gives and, of the same pass, the tokens that `match` reads."""
        tokens = self.encoder(pixels).tokens
        return EncodedVideos(self._embed_frames(tokens[:, :, 0]), tokens.flatten(1, 2))

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors [n, 256] of texts [n, length] that start with [CLS]."""
        hidden = self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        return _unit(self.text_proj(hidden[:, 0]))

    def remember(self, tokens: Tensor) -> VideoMemory:
        """Memory of videos [videos, T * S, dim], with the keys and values of every layer.

        They are computed ahead and not in the first text's pass, because gradient checkpointing
        runs a layer twice, and both runs have to find the same.
        """
        memory = VideoMemory(tokens)
        for layer in self.text_encoder.modules():
            if isinstance(layer, CrossAttention):
                memory.of(layer)
        return memory

    def match(self, input_ids: Tensor, attention_mask: Tensor, memory: VideoMemory) -> Tensor:
        """Logits [videos * n, 2] of "no" and "yes": whether each text belongs to its video.

        ``input_ids`` [videos * n, length]: n texts a video, those of a video in a row; their first
        token is taken as [ENC] whatever it is.
        """
        first = torch.full_like(input_ids[:, :1], self.enc_token_id)
        hidden = self.text_encoder(
            torch.cat([first, input_ids[:, 1:]], dim=1),
            attention_mask=attention_mask,
            encoder_hidden_states=memory,
        ).last_hidden_state
        return self.itm_head(hidden[:, 0])

    def _embed_frames(self, cls_tokens: Tensor) -> Tensor:
        """[batch, T, dim] to [batch, 256]: each frame is projected, then they are averaged."""
        return _unit(self.vision_proj(cls_tokens).mean(dim=1))


def _unit(features: Tensor) -> Tensor:
    # Similarities are divided by a small temperature: 16 bits would not do.
    return normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
