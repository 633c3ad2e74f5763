"""Tiny BLIP retrieval models with weights that matter, and batches for them."""

import torch
from transformers import BlipConfig, BlipForImageTextRetrieval

from tokenmix_ops.video.retrieval import VideoRetriever
from tokenmix_ops.video.tuning import Tuning, apply

FRAMES, SIZE, VOCABULARY, LENGTH = 2, 16, 24, 7


def tiny_model(seed=0, dropout=0.0):
    """A BlipForImageTextRetrieval of two layers each, width 16."""
    common = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = BlipConfig(
        vision_config=dict(common, image_size=SIZE, patch_size=8, layer_norm_eps=1e-6),
        text_config=dict(
            common,
            vocab_size=VOCABULARY,
            encoder_hidden_size=16,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            bos_token_id=22,
            sep_token_id=2,
        ),
        image_text_hidden_size=8,
    )
    model = BlipForImageTextRetrieval(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + (name.lower().endswith("norm.weight")))
    return model


def tiny_retriever(seed=0, dropout=0.0):
    """Its last layer mixes, and everything is trained."""
    retriever = VideoRetriever(tiny_model(seed, dropout), num_frames=FRAMES)
    apply(retriever, Tuning(everything=True))
    return retriever


def texts(count, seed=0, length=LENGTH):
    """Ids and mask of texts of different lengths, starting with token 1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 20, (count, length), generator=generator)
    ids[:, 0] = 1
    ends = torch.randint(3, length + 1, (count,), generator=generator)
    ends[0] = length
    mask = (torch.arange(length) < ends[:, None]).long()
    return ids * mask, mask


def batch(videos, seed=0, dtype=torch.float32):
    """A training batch of pairs of the videos with these numbers."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = texts(len(videos), seed)
    pixels = torch.randn(len(videos), FRAMES, 3, SIZE, SIZE, generator=generator).to(dtype)
    return {
        "pixels": pixels,
        "input_ids": ids,
        "attention_mask": mask,
        "videos": torch.tensor(videos),
    }
