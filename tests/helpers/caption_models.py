"""Tiny BLIP captioners with weights that matter, and clips and captions for them."""

import torch
from transformers import BlipConfig, BlipForConditionalGeneration

from tokenmix_ops.video.captioning import VideoCaptioner

FRAMES, SIZE, PATCH, VOCABULARY = 4, 24, 8, 24
PAD, SEP, DEC = 0, 2, 22


def redraw(model, seed=0, scale=0.3):
    """Noise for every parameter, around 1 for the weights of norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(scale * noise + is_norm)
    return model


def tiny_blip(width=24, depth=2, heads=3, seed=0, dropout=0.0, dtype=torch.float64):
    """A BlipForConditionalGeneration whose text decoder has two layers of width 16."""
    config = BlipConfig(
        vision_config=dict(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            image_size=SIZE,
            patch_size=PATCH,
            layer_norm_eps=1e-6,
        ),
        text_config=dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=VOCABULARY,
            encoder_hidden_size=width,
            max_position_embeddings=40,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            label_smoothing=0.1,
            bos_token_id=DEC,
            sep_token_id=SEP,
            pad_token_id=PAD,
        ),
    )
    model = BlipForConditionalGeneration(config)
    # BlipConfig sets the decoder's width of video tokens by itself.
    assert model.config.text_config.encoder_hidden_size == width
    return redraw(model.to(dtype), seed).eval()


def tiny_captioner(num_frames=FRAMES, **arguments):
    return VideoCaptioner(tiny_blip(**arguments), num_frames=num_frames)


def clip(batch=2, num_frames=FRAMES, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, num_frames, 3, SIZE, SIZE)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def captions(count=2, length=7, seed=0):
    """Ids and mask of captions of different lengths, the first of the full one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, DEC, (count, length), generator=generator)
    ids[:, 0] = DEC
    ends = torch.randint(3, length, (count,), generator=generator)
    ends[0] = length
    ids[torch.arange(count), ends - 1] = SEP
    mask = (torch.arange(length) < ends[:, None]).long()
    return ids * mask, mask
