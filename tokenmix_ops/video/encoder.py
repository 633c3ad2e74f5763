"""A BLIP ViT over the frames of a video, with token mixing in chosen layers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn
from transformers import BlipVisionConfig, BlipVisionModel

from tokenmix_ops.convert import mix_tokens
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.modules import Queries, TokenMixing, set_num_frames
from tokenmix_ops.video.layer import VideoLayer
from tokenmix_ops.video.weights import load_tower, original_tower

Layers = Iterable[int] | Literal["all"]


class VideoEncoding(NamedTuple):
    """The result of a `VideoEncoder`.

    ``tokens`` [batch, num_frames, num_tokens, dim], after the final norm; ``pooled`` [batch, dim],
    the mean of the frames' [CLS] tokens.
    """

    tokens: Tensor
    pooled: Tensor


class VideoEncoder(nn.Module):
    """Encodes videos [batch, num_frames, 3, height, width] with an image ViT that mixes tokens.

    All attention layers run on this package's operator: those in ``mixing_layers`` with
    ``mixing``, the others as plain per-frame attention. The only parameters are the image model's,
    in ``vision_model``. Source: Token Mixing (AAAI 2023), section "Token Mixing".

    Args:
        tower: BLIP's vision tower, converted in place, or a configuration to build one from;
            `blip_vision_config` returns BLIP's.
        num_frames: frames per video.
        mixing, mixing_layers: passed to `mix_tokens`; with no layers this is an image encoder.
    """

    def __init__(
        self,
        tower: BlipVisionModel | BlipVisionConfig,
        *,
        num_frames: int = 8,
        mixing: Mixing | str = "released",
        mixing_layers: Layers = (-1,),
    ) -> None:
        super().__init__()
        if isinstance(tower, BlipVisionConfig):
            tower = BlipVisionModel(tower)
        if not isinstance(tower, BlipVisionModel):
            raise ValueError(
                "expected tower to be a BlipVisionModel or BlipVisionConfig, got "
                f"{type(tower).__name__}"
            )
        mix_tokens(tower, num_frames, "spatial", layers="all")
        self.vision_model = tower
        tower.encoder.layers = nn.ModuleList(
            VideoLayer(cast(Any, layer)) for layer in tower.encoder.layers
        )
        if not isinstance(mixing_layers, str | int):
            mixing_layers = tuple(mixing_layers)
        if mixing_layers != ():
            mix_tokens(self.vision_model, num_frames, mixing, mixing_layers)

    @property
    def config(self) -> BlipVisionConfig:
        return self.vision_model.config

    @property
    def image_size(self) -> int:
        """Height and width of a frame in pixels."""
        size = self.config.image_size
        assert isinstance(size, int)
        return size

    @property
    def layers(self) -> list[VideoLayer]:
        """The encoder layers, lowest first."""
        return list(self.vision_model.encoder.layers)  # type: ignore[arg-type]

    @property
    def num_frames(self) -> int:
        """Frames per video; raises ValueError if the layers disagree."""
        frames = {m.num_frames for m in self.modules() if isinstance(m, TokenMixing)}
        if len(frames) != 1:
            raise ValueError(
                f"expected one num_frames for all layers, got {sorted(frames)}: call set_num_frames"
            )
        return frames.pop()

    def set_num_frames(self, num_frames: int) -> VideoEncoder:
        """Set the frames per video; return the encoder."""
        set_num_frames(self, num_frames)
        # Modules inserted by tuning methods may store num_frames too.
        for module in self.vision_model.encoder.modules():
            if "num_frames" in vars(module):
                setattr(module, "num_frames", num_frames)  # noqa: B010
        return self

    def forward(self, pixels: Tensor, queries: Queries = "all") -> VideoEncoding:
        """Encode ``pixels`` [batch, num_frames, 3, height, width], normalised (`normalize_clip`).

        With ``queries="prefix"`` the last layer computes [CLS] only, and tokens are [batch,
        num_frames, 1, dim].

        Raises ValueError if the number of frames or the size differs from the configuration.
        """
        size = self.config.image_size
        wanted = (self.num_frames, 3, size, size)
        if pixels.dim() != 5 or pixels.shape[1:] != wanted:
            raise ValueError(
                f"expected pixels [batch, num_frames, 3, height, width] = "
                f"{['batch', *wanted]}, got {list(pixels.shape)}: call VideoEncoder.set_num_frames "
                "to change the frames, or build the encoder with another image_size"
            )
        hidden = self.vision_model.embeddings(pixels.flatten(0, 1))
        *lower, last = self.layers
        for layer in lower:
            hidden = layer(hidden)
        hidden = self.vision_model.post_layernorm(last(hidden, queries=queries))
        tokens = hidden.reshape(*pixels.shape[:2], *hidden.shape[1:])
        return VideoEncoding(tokens, tokens[:, :, 0].mean(dim=1))

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        image_size: int | None = None,
        num_frames: int = 8,
        mixing: Mixing | str = "released",
        mixing_layers: Layers = (-1,),
    ) -> VideoEncoder:
        """Load the vision tower of a transformers BLIP model from a directory or hub name.

        Resizes the position embeddings if ``image_size`` differs from the model's. Raises
        ValueError if it is not a BLIP model or its weights do not fit, OSError if not found
        (`load_tower`).
        """
        tower = load_tower(model, image_size=image_size)
        encoder = cls(tower, num_frames=num_frames, mixing=mixing, mixing_layers=mixing_layers)
        return encoder.train()

    @classmethod
    def from_blip_state_dict(
        cls,
        state_dict: Mapping[str, Any] | str | os.PathLike[str],
        *,
        image_size: int,
        num_heads: int,
        patch_size: int = 16,
        num_frames: int = 8,
        mixing: Mixing | str = "released",
        mixing_layers: Layers = (-1,),
    ) -> VideoEncoder:
        """Load the vision tower of an original BLIP checkpoint.

        ``state_dict``: a mapping or a file, opened with ``weights_only=True``; names such as
        ``visual_encoder.blocks.0.attn.qkv.weight``, with or without the prefix, or everything
        under ``"model"``. The weights determine width and depth. Resizes the position embeddings
        bicubically if their grid is not image_size / patch_size. Raises ValueError naming missing,
        unexpected or wrongly shaped weights (`original_tower`).
        """
        tower = original_tower(
            state_dict, image_size=image_size, num_heads=num_heads, patch_size=patch_size
        )
        encoder = cls(tower, num_frames=num_frames, mixing=mixing, mixing_layers=mixing_layers)
        return encoder.train()
