"""Configurations of BLIP, against the values and sizes of the published models."""

import pytest
import torch

from tokenmix_ops.video.blip import blip_config, blip_vision_config, build_blip

pytestmark = pytest.mark.interfaces

TASKS = ("captioning", "retrieval")


def test_the_vision_configuration_is_that_of_blip():
    config = blip_vision_config()
    assert (config.layer_norm_eps, config.initializer_range) == (1e-6, 0.02)
    assert (config.image_size, config.patch_size, config.intermediate_size) == (224, 16, 3072)
    assert (config.hidden_act, config.attention_dropout) == ("gelu", 0.0)
    large = blip_vision_config("vit-l16", image_size=384, layer_norm_eps=1e-5)
    assert (large.hidden_size, large.num_hidden_layers, large.num_attention_heads) == (1024, 24, 16)
    assert (large.image_size, large.layer_norm_eps, large.intermediate_size) == (384, 1e-5, 4096)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("backbone", "width", "visual"), [
    ("vit-b16", 768, 85_798_656), ("vit-l16", 1024, 303_301_632),
])  # fmt: skip
def test_configurations_are_those_of_blip(task, backbone, width, visual):
    config = blip_config(backbone, task)
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_attention_heads, text.num_hidden_layers) == (768, 12, 12)
    assert (text.hidden_dropout_prob, text.attention_probs_dropout_prob) == (0.1, 0.1)
    assert (text.label_smoothing, text.is_decoder, text.layer_norm_eps) == (0.1, True, 1e-12)
    assert (text.encoder_hidden_size, text.intermediate_size) == (width, 3072)
    assert (text.vocab_size, text.bos_token_id, text.sep_token_id) == (30524, 30522, 102)
    assert (text.pad_token_id, text.max_position_embeddings) == (0, 512)
    assert (vision.hidden_size, vision.num_attention_heads) == (width, width // 64)
    assert (vision.layer_norm_eps, vision.initializer_range) == (1e-6, 0.02)
    assert (config.image_text_hidden_size, config.initializer_range) == (256, 0.02)
    with torch.device("meta"):
        model = build_blip(config, task)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(p.numel() for p in model.vision_model.parameters()) == visual


def test_wrong_names_are_named():
    with pytest.raises(
        ValueError, match="expected task to be 'captioning' or 'retrieval', got 'vqa'"
    ):
        blip_config("vit-b16", "vqa")
    with pytest.raises(
        ValueError, match="expected backbone to be one of 'vit-b16', 'vit-l16', got 'x'"
    ):
        blip_config("x", "captioning")
    with pytest.raises(
        ValueError, match="expected architecture to be one of 'vit-b16', 'vit-l16', got"
    ):
        blip_vision_config("vit-h14")
