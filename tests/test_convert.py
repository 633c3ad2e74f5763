"""Conversion of image ViTs: what it changes, what it leaves alone, and that it can be undone."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from recorded_calls import assert_answered_alike, pass_besides, record
from torch import nn
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import tokenmix_ops as tm
from tokenmix_ops.convert import ConvertedAttention
from tokenmix_ops.families import FAMILIES
from tokenmix_ops.projections import PackedParameters, PackedProjection
from tokenmix_ops.testing import max_error
from tokenmix_ops.tolerance import rms_error, rms_limit
from tokenmix_ops.video.encoder import VideoEncoder

VIDEOS, FRAMES, LAYERS, DIM, HEADS, SIZE, PATCHES = 2, 4, 3, 24, 3, 24, 9
VISION = dict(
    hidden_size=DIM,
    intermediate_size=2 * DIM,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    image_size=SIZE,
    patch_size=8,
)
TEXT = dict(
    vocab_size=20,
    hidden_size=DIM,
    encoder_hidden_size=DIM,
    intermediate_size=2 * DIM,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    max_position_embeddings=16,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
WORDS = torch.arange(3, 8).repeat(VIDEOS * FRAMES, 1)


@dataclass(frozen=True)
class Model:
    """One model to convert, how to run it on frames, and its tokens that are not patches."""

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda model, frames: (
        model(frames).last_hidden_state
    )
    num_prefix_tokens: int = 1


def timm_vit():
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=SIZE,
        patch_size=8,
        embed_dim=DIM,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=5,
        reg_tokens=2,
        qk_norm=True,
        scale_attn_norm=True,
    )


def open_clip_model():
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=LAYERS, width=DIM, head_width=8, image_size=SIZE, patch_size=8)
    return CLIP(8, vision, CLIPTextCfg(context_length=8, vocab_size=20, width=DIM, heads=3))


MODELS = {
    "BLIP": Model(lambda: BlipVisionModel(BlipVisionConfig(**VISION))),
    "BLIP captioner": Model(
        lambda: BlipForConditionalGeneration(BlipConfig(text_config=TEXT, vision_config=VISION)),
        lambda model, frames: model(pixel_values=frames, input_ids=WORDS).logits,
    ),
    "tower of BLIP captioner": Model(
        lambda: (
            BlipForConditionalGeneration(
                BlipConfig(text_config=TEXT, vision_config=VISION)
            ).vision_model
        ),
    ),
    "BLIP-2": Model(lambda: Blip2VisionModel(Blip2VisionConfig(**VISION))),
    "CLIP vision": Model(lambda: CLIPVisionModel(CLIPVisionConfig(**VISION))),
    "CLIP vision, projected": Model(
        lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=8, **VISION)),
        lambda model, frames: model(frames).image_embeds,
    ),
    "CLIP": Model(
        lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)),
        lambda model, frames: model(pixel_values=frames, input_ids=WORDS).image_embeds,
    ),
    "SigLIP": Model(
        lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
        lambda model, frames: torch.cat(
            [model(frames).last_hidden_state, model(frames).pooler_output.unsqueeze(1)], dim=1
        ),
        num_prefix_tokens=0,
    ),
    "ViT": Model(lambda: ViTModel(ViTConfig(**VISION))),
    "ViT classifier": Model(
        lambda: ViTForImageClassification(ViTConfig(num_labels=5, **VISION)),
        lambda model, frames: model(frames).logits,
    ),
    "DINOv2": Model(lambda: Dinov2Model(Dinov2Config(**VISION))),
    "DINOv2 backbone": Model(
        lambda: Dinov2Backbone(Dinov2Config(reshape_hidden_states=False, **VISION)),
        lambda model, frames: model(frames).feature_maps[-1],
    ),
    "DINOv2 with registers": Model(
        lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(num_register_tokens=3, **VISION)
        ),
        num_prefix_tokens=4,
    ),
    "timm": Model(timm_vit, lambda model, frames: model(frames), num_prefix_tokens=3),
    "open_clip": Model(open_clip_model, lambda model, frames: model.encode_image(frames)),
}
WITH_TEXT = ("BLIP captioner", "CLIP")


def redraw(model, seed=0):
    """All parameters anew from a normal distribution: some models begin almost at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@cache
def template(name):
    return redraw(MODELS[name].build())


def make(name, dtype=torch.float32):
    return copy.deepcopy(template(name)).to(dtype)


@cache
def pixels(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(VIDEOS * FRAMES, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return frames.to(dtype)


def run(name, model, frames=None):
    return MODELS[name].run(model, pixels() if frames is None else frames)


def converted(model):
    return [layer for layer in model.modules() if isinstance(layer, ConvertedAttention)]


def modules(model):
    return list(model.named_modules())


def gradients(model, output):
    model.zero_grad()
    output.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.interfaces
@pytest.mark.parametrize("name", MODELS)
def test_spatial_computes_what_the_model_did(name):
    model = make(name)
    exact = run(name, copy.deepcopy(model).double(), pixels(torch.float64))
    plain = run(name, model)
    tm.mix_tokens(model, FRAMES, "spatial", "all")
    assert len(converted(model)) == LAYERS
    assert rms_error(run(name, model), exact) <= rms_limit(exact, plain)


@pytest.mark.interfaces
@pytest.mark.parametrize("name", MODELS)
def test_every_call_of_a_model_is_taken_and_answered_alike(name):
    plain, ours = make(name, torch.float64), make(name, torch.float64)
    tm.mix_tokens(ours, FRAMES, "spatial", "all")
    layers = {n: m for n, m in modules(ours) if isinstance(m, ConvertedAttention)}
    calls = record(plain, list(layers))
    with torch.no_grad():
        wanted = run(name, plain, pixels(torch.float64))
        assert max_error(run(name, ours, pixels(torch.float64)), wanted) < 1e-10
        for layer, module in layers.items():
            assert calls[layer]
            for call in calls[layer]:
                assert_answered_alike(module, call, 1e-10)


@pytest.mark.interfaces
@pytest.mark.parametrize("name", MODELS)
def test_arguments_of_versions_to_come_change_nothing(name):
    model = tm.mix_tokens(make(name), FRAMES, "released", "all")
    wanted = run(name, model)
    handles = [
        pass_besides(layer, some_future_name=None, a_flag=True, a_cache=object())
        for layer in converted(model)
    ]
    assert torch.equal(run(name, model), wanted)
    for handle in handles:
        handle.remove()
    pass_besides(converted(model)[0], a_mask=torch.ones(1))
    with pytest.raises(ValueError, match="no attention mask and no other keys, got a_mask"):
        run(name, model)


@pytest.mark.parametrize("name", MODELS)
def test_spatial_has_the_gradients_that_the_model_had(name):
    model = make(name, torch.float64)
    output = run(name, model, pixels(torch.float64))
    before = gradients(model, output)
    tm.mix_tokens(model, FRAMES, "spatial", "all")
    again = run(name, model, pixels(torch.float64))
    assert max_error(again, output) <= 1e-11 * float(output.detach().abs().amax())
    after = gradients(model, again)
    assert after.keys() == before.keys()
    for parameter, gradient in after.items():
        limit = 1e-11 * max(1.0, float(before[parameter].abs().amax()))
        assert max_error(gradient, before[parameter]) <= limit, parameter


@pytest.mark.parametrize("mixing", ["paper", "adjacent", "joint"])
@pytest.mark.parametrize("name", MODELS)
def test_a_video_that_stands_still_is_read_as_its_image(name, mixing):
    model = make(name, torch.float64)
    still = pixels(torch.float64)[::FRAMES].repeat_interleave(FRAMES, dim=0)
    before = run(name, model, still)
    tm.mix_tokens(model, FRAMES, mixing, "all")
    limit = 1e-11 * float(before.detach().abs().amax())
    assert max_error(run(name, model, still), before) <= limit


@pytest.mark.interfaces
@pytest.mark.parametrize("name", MODELS)
def test_unmixing_brings_the_original_layers_back(name):
    model = make(name)
    before, layers = run(name, model), modules(model)
    tm.mix_tokens(model, FRAMES, "released", "all")
    assert max_error(run(name, model), before.double()) > 1e-3
    assert tm.unmix_tokens(model) is model
    assert all(new is old for (_, new), (_, old) in zip(modules(model), layers, strict=True))
    assert torch.equal(run(name, model), before)


@pytest.mark.parametrize("name", MODELS)
def test_state_dicts_load_both_ways(name):
    plain, model = make(name), tm.mix_tokens(redraw(make(name), seed=3), FRAMES, "paper", "all")
    names = list(plain.state_dict())
    assert list(model.state_dict()) == names
    trained = run(name, model)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(run(name, tm.mix_tokens(plain, FRAMES, "paper", "all")), trained)
    model.load_state_dict(template(name).state_dict())
    assert torch.equal(run(name, tm.unmix_tokens(model)), run(name, make(name)))


@pytest.mark.parametrize("name", MODELS)
def test_released_in_the_last_layer_sees_the_order_of_frames(name):
    model = make(name)
    before = run(name, model)
    assert tm.mix_tokens(model) is model
    tm.set_num_frames(model, FRAMES)
    (layer,) = converted(model)
    assert repr(layer.mixing) == "Mixing.released()"
    assert layer.num_prefix_tokens == MODELS[name].num_prefix_tokens
    mixed = run(name, model)
    assert max_error(mixed, before.double()) > 1e-3

    def reverse(batch):
        return batch.unflatten(0, (VIDEOS, FRAMES)).flip(1).flatten(0, 1)

    assert max_error(run(name, model, reverse(pixels())), reverse(mixed).double()) > 1e-3


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITH_TEXT])
def test_videos_of_a_batch_do_not_see_each_other(name):
    model = tm.mix_tokens(make(name, torch.float64), FRAMES, "released", "all")
    frames = pixels(torch.float64)
    together, second = run(name, model, frames), run(name, model, frames[FRAMES:])
    assert max_error(together[FRAMES:], second) < 1e-11 * float(second.detach().abs().amax())


@pytest.mark.interfaces
@pytest.mark.parametrize("name", MODELS)
def test_copies_are_complete_and_independent(name):
    model = tm.mix_tokens(make(name), FRAMES)
    # A backbone of transformers holds hooks that cannot be pickled.
    ways = [copy.deepcopy] + [lambda m: pickle.loads(pickle.dumps(m))] * (name != "DINOv2 backbone")
    copies = [way(model) for way in ways]
    before = run(name, model)
    for other in copies:
        assert torch.equal(run(name, other), before)
        redraw(other, seed=5)
        assert torch.equal(run(name, model), before)
        trained = copy.deepcopy(other.state_dict())
        tm.unmix_tokens(other)
        assert not converted(other)
        assert len(converted(model)) == 1
        for key, value in other.state_dict().items():
            assert torch.equal(value, trained[key]), key


def test_the_text_tower_of_clip_stays_untouched():
    model = make("CLIP")
    before = model(pixel_values=pixels(), input_ids=WORDS).text_embeds
    text = modules(model.text_model)
    tm.mix_tokens(model, FRAMES, "released", "all")
    assert modules(model.text_model) == text
    assert len(converted(model.vision_model)) == LAYERS
    after = model(pixel_values=pixels(), input_ids=WORDS).text_embeds
    assert torch.equal(before, after)


def test_only_selected_tokens_reach_separate_key_and_value_projections():
    model = tm.mix_tokens(make("CLIP vision"), FRAMES)
    (layer,) = converted(model)
    shapes = {}
    for child in ("q_proj", "k_proj", "v_proj"):
        layer.get_submodule(child).register_forward_hook(
            lambda module, inputs, output, child=child: shapes.update({child: inputs[0].shape})
        )
    model(pixels())
    keys = FRAMES + PATCHES
    assert shapes == {
        "q_proj": (VIDEOS, FRAMES, 1 + PATCHES, DIM),
        "k_proj": (VIDEOS, keys, DIM),
        "v_proj": (VIDEOS, keys, DIM),
    }


LAYER_CHOICES = {
    "last": ((-1,), [2]),
    "first": ((0,), [0]),
    "all": ("all", [0, 1, 2]),
    "twice the same": ((-1, 2, 2), [2]),
    "from both ends": ([1, -3], [0, 1]),
    "range": (range(2), [0, 1]),
    "generator": ((layer for layer in (1, 2)), [1, 2]),
}


@pytest.mark.parametrize("choice", LAYER_CHOICES)
def test_layers_are_counted_from_both_ends(choice):
    layers, wanted = LAYER_CHOICES[choice]
    model = tm.mix_tokens(make("BLIP"), FRAMES, "released", layers)
    attentions = [layer.self_attn for layer in model.encoder.layers]
    assert [i for i, layer in enumerate(attentions) if layer in converted(model)] == wanted


WRONG_LAYERS = {
    "past the end": ((3,), "layer 3 does not exist: the tower has 3 layers"),
    "before the start": ((0, -4), "layer -4 does not exist: the tower has 3 layers"),
    "none": ((), "layers must name at least one layer, got none"),
    "a fraction": ((1.0,), "layers must be whole numbers, got 1.0"),
    "a word": ("last", "layers must be a sequence of layer numbers or 'all', got 'last'"),
    "a number": (-1, "layers must be a sequence of layer numbers or 'all', got -1"),
}


@pytest.mark.parametrize("wrong", WRONG_LAYERS)
def test_wrong_layers_are_named_and_change_nothing(wrong):
    layers, text = WRONG_LAYERS[wrong]
    model = make("BLIP")
    before = modules(model)
    with pytest.raises(ValueError) as error:
        tm.mix_tokens(model, FRAMES, "released", layers)
    assert str(error.value) == text
    assert modules(model) == before


def test_converting_again_changes_the_mixing():
    model = make("BLIP")
    before = modules(model)
    expected = run("BLIP", tm.mix_tokens(make("BLIP"), FRAMES, "paper", (0, 2)))
    tm.mix_tokens(model, 2, "joint", "all")
    tm.mix_tokens(model, FRAMES, "spatial", (1,))
    tm.mix_tokens(model, FRAMES, "paper", (0, 2))
    assert [layer.mixing.kind for layer in converted(model)] == ["paper", "spatial", "paper"]
    assert max_error(run("BLIP", model), expected.double()) < 1e-4
    assert modules(tm.unmix_tokens(model)) == before


def test_a_failed_second_conversion_changes_nothing():
    model = tm.mix_tokens(make("BLIP"), FRAMES, "paper", "all")
    before, output = modules(model), run("BLIP", model)
    model.encoder.layers[2].self_attn.dropout.p = 0.1
    with pytest.raises(ValueError, match="token mixing has no attention dropout"):
        tm.mix_tokens(model, FRAMES, "joint", "all")
    assert modules(model) == before
    assert torch.equal(run("BLIP", model), output)


def test_trained_weights_stay_after_unmixing():
    model = make("BLIP")
    originals = [layer.self_attn for layer in model.encoder.layers]
    untrained = copy.deepcopy(model.state_dict())
    tm.mix_tokens(model, FRAMES, "released", "all")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run("BLIP", model).square().mean().backward()
    optimizer.step()
    trained = copy.deepcopy(model.state_dict())
    tm.unmix_tokens(model)
    assert [layer.self_attn for layer in model.encoder.layers] == originals
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name])
        if "qkv" in name or "projection" in name:
            assert not torch.equal(value, untrained[name]), name


class Lora(nn.Module):
    """A projection with a low-rank update, as adapters of models wrap it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("child", ["qkv", "projection"])
def test_a_child_wrapped_after_conversion_survives_unmixing(child):
    model = tm.mix_tokens(make("BLIP"), FRAMES, "spatial", "all")
    before = run("BLIP", model)
    wrapped = redraw(Lora(getattr(model.encoder.layers[1].self_attn, child)), seed=2)
    setattr(model.encoder.layers[1].self_attn, child, wrapped)
    mixed = run("BLIP", model)
    assert max_error(mixed, before.double()) > 1e-3
    tm.unmix_tokens(model)
    assert getattr(model.encoder.layers[1].self_attn, child) is wrapped
    assert max_error(run("BLIP", model), mixed.double()) < 1e-4


def test_one_of_the_parameters_replaced_after_conversion_survives_unmixing():
    model = tm.mix_tokens(make("open_clip"), FRAMES)
    (layer,) = converted(model)
    weight = layer.in_proj_weight = nn.Parameter(2 * layer.in_proj_weight.detach())
    tm.unmix_tokens(model)
    assert model.visual.transformer.resblocks[-1].attn.in_proj_weight is weight


class OwnAttention(nn.Module):
    """A user's attention layer: other names, another scale, a buffer, and nothing but a tensor."""

    def __init__(self):
        super().__init__()
        self.heads, self.factor, self.p_drop = HEADS, 0.25, 0.0
        self.to_qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.out = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.talking = None
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1)
        )
        mixed = ((q @ k.transpose(-1, -2)) * self.factor).softmax(-1) @ v
        return self.out(self.norm(mixed.transpose(1, 2).flatten(-2)))


class OwnViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.attentions = nn.ModuleList(OwnAttention() for _ in range(LAYERS))

    def forward(self, x):
        for attention in self.attentions:
            x = x + attention(x)
        return x


OWN_FAMILY = tm.VisionFamily(
    "my ViT",
    (f"{OwnViT.__module__}.OwnViT",),
    f"{OwnAttention.__module__}.OwnAttention",
    PackedProjection("to_qkv"),
    ("norm", "out"),
    num_heads="heads",
    scale="factor",
    attention_dropout="p_drop",
    num_prefix_tokens=2,
    returns_tuple=False,
    refuses=("talking",),
)


@pytest.fixture
def own_family():
    kept = list(FAMILIES)
    tm.register_family(OWN_FAMILY)
    yield
    FAMILIES[:] = kept


@pytest.mark.usefixtures("own_family")
def test_a_registered_family_is_converted():
    model = nn.Sequential(nn.Identity(), redraw(OwnViT()).double())
    tokens = torch.randn(VIDEOS * FRAMES, 11, DIM, dtype=torch.float64)
    before, layers, names = model(tokens), modules(model), list(model.state_dict())
    tm.mix_tokens(model, FRAMES, "spatial", "all")
    assert max_error(model(tokens), before) < 1e-12
    assert list(model.state_dict()) == names
    converted(model)[0].steps += 1
    tm.mix_tokens(model, FRAMES, "released")
    assert [layer.num_prefix_tokens for layer in converted(model)] == [2, 2, 2]
    assert max_error(model(tokens), before) > 1e-3
    assert modules(tm.unmix_tokens(model)) == layers
    assert torch.equal(model(tokens), before)
    assert [int(layer.steps) for layer in model[1].attentions] == [1, 0, 0]


@pytest.mark.usefixtures("own_family")
def test_what_a_registered_family_refuses_is_named():
    model = OwnViT()
    model.attentions[2].talking = nn.Linear(1, 1)
    with pytest.raises(ValueError) as error:
        tm.mix_tokens(model)
    assert str(error.value) == "OwnAttention with 'talking' is not supported"
    model.attentions[1].p_drop = 0.5
    with pytest.raises(ValueError) as error:
        tm.mix_tokens(model, layers=(1,))
    assert str(error.value) == (
        "token mixing has no attention dropout, but OwnAttention has p_drop = 0.5; build the "
        "model with 0"
    )


@pytest.mark.usefixtures("own_family")
def test_a_family_of_the_same_name_is_replaced():
    count = len(FAMILIES)
    other = tm.VisionFamily("my ViT", ("x.Y",), "x.Z", PackedProjection(), ())
    tm.register_family(other)
    assert len(FAMILIES) == count
    with pytest.raises(ValueError, match="OwnViT has no supported vision tower"):
        tm.mix_tokens(OwnViT())


@pytest.mark.parametrize("name", ["BLIP", "CLIP vision", "ViT", "BLIP-2", "DINOv2", "timm"])
def test_attention_dropout_is_refused(name):
    builds = {
        "BLIP": lambda: BlipVisionModel(BlipVisionConfig(attention_dropout=0.1, **VISION)),
        "BLIP-2": lambda: Blip2VisionModel(Blip2VisionConfig(attention_dropout=0.1, **VISION)),
        "CLIP vision": lambda: CLIPVisionModel(CLIPVisionConfig(attention_dropout=0.1, **VISION)),
        "ViT": lambda: ViTModel(ViTConfig(attention_probs_dropout_prob=0.1, **VISION)),
        "DINOv2": lambda: Dinov2Model(Dinov2Config(attention_probs_dropout_prob=0.1, **VISION)),
        "timm": lambda: timm_with(attn_drop_rate=0.1),
    }
    model = builds[name]()
    before = modules(model)
    pattern = r"^token mixing has no attention dropout, but \w+ has \w+ = 0\.1; build the model "
    with pytest.raises(ValueError, match=pattern + "with 0$"):
        tm.mix_tokens(model)
    assert modules(model) == before


def timm_with(**arguments):
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=DIM, depth=LAYERS, num_heads=HEADS, **arguments
    )


def test_a_gate_of_timm_is_refused():
    model = timm_with()
    model.blocks[2].attn.gate = nn.Linear(DIM, DIM)
    with pytest.raises(ValueError) as error:
        tm.mix_tokens(model)
    assert str(error.value) == "Attention with 'gate' is not supported"


def test_tokens_before_the_batch_are_refused():
    model = make("open_clip")
    model.visual.transformer.resblocks[2].attn.batch_first = False
    with pytest.raises(ValueError) as error:
        tm.mix_tokens(model)
    assert str(error.value) == "MultiheadAttention with 'batch_first' = False is not supported"


WRONG_INPUTS = {
    "attention_mask": (lambda layer, x: layer(x, attention_mask=torch.ones(1)), "attention_mask"),
    "attn_mask": (lambda layer, x: layer(x, attn_mask=torch.ones(1)), "attn_mask"),
    "causal": (lambda layer, x: layer(x, is_causal=True), "is_causal"),
    "other keys": (lambda layer, x: layer(x, x.clone(), x), "a second tensor"),
    "mask in second place": (lambda layer, x: layer(x, torch.ones(1)), "a second tensor"),
    "tokens as mask": (lambda layer, x: layer(x, attention_mask=x), "attention_mask"),
    "tokens in fourth place": (lambda layer, x: layer(x, x, x, x), "a second tensor"),
    "array in second place": (lambda layer, x: layer(x, np.ones(1)), "a second tensor"),
    "array": (lambda layer, x: layer(x, bias=np.ones(1)), "bias"),
    "tensor deep inside": (lambda layer, x: layer(x, more=[{"a": (1, x)}]), "more"),
    "list as mask": (lambda layer, x: layer(x, attn_mask=[[0, 1]]), "attn_mask"),
    "object as mask": (lambda layer, x: layer(x, block_mask=object()), "block_mask"),
    "heads": (lambda layer, x: layer(x, head_mask=[1.0, 0.0, 1.0]), "head_mask"),
    "causal as a number": (lambda layer, x: layer(x, is_causal=1), "is_causal"),
}


@pytest.mark.parametrize("wrong", WRONG_INPUTS)
def test_masks_and_other_keys_are_refused(wrong):
    call, given = WRONG_INPUTS[wrong]
    (layer,) = converted(tm.mix_tokens(make("BLIP"), FRAMES))
    tokens = torch.zeros(FRAMES, 1 + PATCHES, DIM)
    with pytest.raises(ValueError) as error:
        call(layer, tokens)
    assert str(error.value) == (
        f"token mixing takes no attention mask and no other keys, got {given}"
    )
    output, weights = layer(tokens, attention_mask=None, is_causal=False, num_frames=FRAMES)
    assert output.shape == tokens.shape
    assert weights is None
    layer(tokens, None, None, [None, (1, "a")], attn_mask=None, is_causal=0, more={"a": [2.0]})


SUPPORTED = (
    "Supported: transformers BLIP (BlipVisionModel); transformers BLIP-2 (Blip2VisionModel); "
    "transformers CLIP (CLIPVisionModel); transformers SigLIP (SiglipVisionModel); transformers "
    "ViT (ViTModel); transformers DINOv2 (Dinov2Model); "
)


def test_an_unsupported_model_is_told_what_is_supported():
    with pytest.raises(ValueError) as error:
        tm.mix_tokens(nn.Linear(2, 2))
    text = str(error.value)
    assert text.startswith("Linear has no supported vision tower. " + SUPPORTED)
    for part in ("DINOv2 with registers", "timm (Vision", "open_clip (Vision"):
        assert part in text
    assert text.endswith("Declare others with tokenmix_ops.register_family(VisionFamily(...))")


def test_two_towers_are_told_apart():
    model = nn.ModuleDict({"one": make("BLIP"), "other": make("CLIP vision")})
    before = modules(model)
    with pytest.raises(ValueError) as error:
        tm.mix_tokens(model)
    text = "ModuleDict has 2 vision towers; pass one of them. Supported: "
    assert str(error.value).startswith(text)
    assert modules(model) == before
    tm.mix_tokens(model["other"])
    assert len(converted(model)) == 1
    assert modules(tm.unmix_tokens(model)) == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(num_frames=0), "num_frames must be a whole number, at least 1, got 0"),
        (dict(mixing="mixed"), "mixing must be a Mixing or one of 'paper', 'released', "),
    ],
)
def test_wrong_arguments_change_nothing(arguments, text):
    model = make("BLIP")
    before = modules(model)
    with pytest.raises(ValueError) as error:
        tm.mix_tokens(model, layers="all", **arguments)
    assert str(error.value).startswith(text)
    assert modules(model) == before


def test_the_failure_of_one_layer_leaves_the_others_alone():
    model = make("BLIP")
    before = modules(model)
    model.encoder.layers[1].self_attn.dropout.p = 0.1
    with pytest.raises(ValueError, match="token mixing has no attention dropout"):
        tm.mix_tokens(model, FRAMES, "released", "all")
    assert modules(model) == before
    tm.mix_tokens(model, FRAMES, "released", (0, 2))
    assert len(converted(model)) == 2


@pytest.mark.parametrize("name", ["BLIP", "CLIP vision", "open_clip"])
def test_moved_to_another_dtype(name):
    plain = make(name)
    model = tm.mix_tokens(copy.deepcopy(plain), FRAMES, "released", "all").double()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert run(name, model, pixels(torch.float64)).dtype == torch.float64
    tm.unmix_tokens(model)
    expected = run(name, plain.double(), pixels(torch.float64))
    assert torch.equal(run(name, model, pixels(torch.float64)), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_training_flags_stay_through_conversion_and_back(mode):
    model = make("BLIP").train(mode)
    model.encoder.layers[0].self_attn.qkv.train(not mode)
    before = [module.training for module in model.modules()]
    tm.mix_tokens(model, FRAMES, "released", "all")
    assert [module.training for module in model.modules()] == before
    tm.mix_tokens(model, FRAMES, "paper", "all")
    assert [module.training for module in model.modules()] == before
    assert [module.training for module in tm.unmix_tokens(model).modules()] == before
    tm.mix_tokens(model, FRAMES, "released", "all").train(not mode)
    assert all(module.training is not mode for module in tm.unmix_tokens(model).modules())


def test_backend_is_passed_on():
    model = tm.mix_tokens(make("BLIP"), FRAMES, backend="eager")
    assert [layer.backend for layer in converted(model)] == ["eager"]
    run("BLIP", model)
    with pytest.raises(ValueError, match=r"^unknown backend 'fast' \(argument backend\)"):
        tm.mix_tokens(model, FRAMES, backend="fast")
    assert [layer.backend for layer in converted(model)] == ["eager"]


def test_the_number_of_frames_can_change():
    model = tm.mix_tokens(make("BLIP"), FRAMES, "paper", "all")
    assert tm.set_num_frames(model, 2) is model
    expected = run("BLIP", tm.mix_tokens(make("BLIP"), 2, "paper", "all"))
    assert torch.equal(run("BLIP", model), expected)
    with pytest.raises(ValueError, match="num_frames = 3, got"):
        run("BLIP", tm.set_num_frames(model, 3))


@pytest.mark.interfaces
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model = tm.mix_tokens(make("BLIP", torch.float64), FRAMES, "released", "all").train()
    frames = pixels(torch.float64).clone().requires_grad_()
    expected = gradients(model, run("BLIP", model, frames))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    converted(model)[0].register_forward_hook(lambda *_: calls.append(1))
    output = run("BLIP", model, frames)
    assert len(calls) == 1
    actual = gradients(model, output)
    assert len(calls) == 2
    for name, gradient in actual.items():
        assert max_error(gradient, expected[name]) < 1e-12, name


def published_layer(tokens, qkv, projection, num_heads, num_frames=8, gain=0.8):
    """The authors' attention, as their published code reads: tokens [batch * num_frames, S, dim].

    Every token is projected. The keys are the class tokens of all frames, then for each frame the
    patches p with ``p % num_frames`` equal to it; logits of patches of other frames are scaled.
    """
    num_tokens, dim = tokens.shape[1:]
    packed = qkv(tokens).reshape(-1, num_frames, num_tokens, 3, num_heads, dim // num_heads)
    query, key, value = packed.unbind(3)
    patches = [
        (frame, patch)
        for frame in range(num_frames)
        for patch in range(num_tokens - 1)
        if patch % num_frames == frame
    ]
    frames = list(range(num_frames)) + [frame for frame, _ in patches]
    places = [0] * num_frames + [1 + patch for _, patch in patches]
    key, value = key[:, frames, places], value[:, frames, places]
    logits = torch.einsum("btshd,bmhd->bhtsm", query, key) * (dim // num_heads) ** -0.5
    scaled = torch.ones(num_frames, len(frames), dtype=tokens.dtype)
    for frame in range(num_frames):
        for slot in range(num_frames, len(frames)):
            if frames[slot] != frame:
                scaled[frame, slot] = gain
    weights = (logits * scaled[:, None, :]).softmax(-1)
    mixed = torch.einsum("bhtsm,bmhd->btshd", weights, value)
    return projection(mixed.reshape(-1, num_tokens, dim))


@pytest.mark.parametrize("num_tokens", [197, 50])
def test_a_converted_layer_equals_the_published_one(num_tokens):
    model = make("BLIP", torch.float64)
    attention = model.encoder.layers[-1].self_attn
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(2 * 8, num_tokens, DIM, generator=generator, dtype=torch.float64)
    expected = published_layer(tokens, attention.qkv, attention.projection, HEADS)
    tm.mix_tokens(model)
    output, _ = model.encoder.layers[-1].self_attn(hidden_states=tokens)
    assert max_error(output, expected) <= 1e-12
    plain, _ = attention(tokens)
    assert max_error(plain, expected) > 1e-3


def video_encoder(mixing="spatial", dtype=torch.float64, **arguments):
    encoder = VideoEncoder(
        BlipVisionConfig(**VISION), num_frames=FRAMES, mixing=mixing, **arguments
    )
    return redraw(encoder).to(dtype)


ORDERS = {"reversed": [3, 2, 1, 0], "rotated": [1, 2, 3, 0], "swapped": [0, 2, 1, 3]}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_spatial_encoder_cannot_tell_the_order_of_frames(order, dtype):
    encoder = video_encoder(mixing_layers=(), dtype=dtype)
    clip = pixels(dtype).unflatten(0, (VIDEOS, FRAMES))
    one, other = encoder(clip), encoder(clip[:, ORDERS[order]])
    assert torch.equal(other.tokens, one.tokens[:, ORDERS[order]])
    rounding = FRAMES * torch.finfo(dtype).eps * float(one.tokens.detach().abs().amax())
    assert max_error(other.pooled, one.pooled.double()) <= rounding


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mixing", ["temporal", "joint"])
def test_attention_without_a_place_in_time_cannot_tell_the_order_either(mixing, order):
    encoder = video_encoder(mixing)
    clip = pixels(torch.float64).unflatten(0, (VIDEOS, FRAMES))
    one, other = encoder(clip), encoder(clip[:, ORDERS[order]])
    limit = 1e-11 * float(one.tokens.detach().abs().amax())
    assert max_error(other.tokens, one.tokens[:, ORDERS[order]]) <= limit
    assert max_error(other.pooled, one.pooled) <= limit
    still = clip[:, :1].expand_as(clip)
    assert max_error(encoder(still).pooled, one.pooled) > 1e-3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mixing", ["released", "paper", "adjacent"])
def test_token_mixing_tells_the_order_of_frames(mixing, order):
    encoder = video_encoder(mixing)
    clip = pixels(torch.float64).unflatten(0, (VIDEOS, FRAMES))
    one, other = encoder(clip), encoder(clip[:, ORDERS[order]])
    assert max_error(other.tokens, one.tokens[:, ORDERS[order]]) > 1e-3
    assert max_error(other.pooled, one.pooled) > 1e-3


class Block(nn.Module):
    """One layer of nn.MultiheadAttention, to be declared as a family."""

    def __init__(self, **arguments):
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True, **arguments)

    def forward(self, tokens, **arguments):
        return self.attn(tokens, tokens, tokens, **arguments)[0]


@pytest.fixture
def block_family():
    kept = list(FAMILIES)
    tm.register_family(
        tm.VisionFamily(
            "block",
            (f"{__name__}.Block",),
            "torch.nn.modules.activation.MultiheadAttention",
            PackedParameters(),
            ("out_proj",),
            scale=None,
            refuses=("bias_k", "bias_v", "q_proj_weight", "add_zero_attn"),
        )
    )
    yield
    FAMILIES[:] = kept


@pytest.mark.usefixtures("block_family")
def test_other_tensors_are_refused_whatever_they_are_called():
    model = tm.mix_tokens(Block(), FRAMES)
    tokens = torch.randn(VIDEOS * FRAMES, 10, DIM)
    plain = model(tokens, need_weights=False, attn_mask=None)
    for args, named in (((), ("key", "value")), ((tokens,), ("value",)), ((), ("query",))):
        output, _ = model.attn(tokens, *args, **dict.fromkeys(named, tokens))
        assert torch.equal(output, plain)
    with pytest.raises(ValueError, match="got key_padding_mask"):
        model(tokens, key_padding_mask=tokens)
    with pytest.raises(ValueError, match="got other"):
        model.attn(tokens, other=tokens)
    for name in ("attn_mask", "key_padding_mask", "position_embeddings"):
        with pytest.raises(
            ValueError, match=f"takes no attention mask and no other keys, got {name}"
        ):
            model(tokens, **{name: torch.ones(3)})
    with pytest.raises(ValueError, match="got key, value"):
        model.attn(tokens, key=tokens.clone(), value=tokens.clone())
    with pytest.raises(ValueError, match="got is_causal"):
        model(tokens, is_causal=True)


@pytest.mark.usefixtures("block_family")
def test_layers_that_do_more_are_refused():
    for arguments, name in (
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"add_bias_kv": True}, "bias_k"),
        ({"kdim": 5, "vdim": 5}, "q_proj_weight"),
    ):
        with pytest.raises(ValueError, match=f"MultiheadAttention with '{name}' is not supported"):
            tm.mix_tokens(Block(**arguments), FRAMES)


@pytest.mark.interfaces
@pytest.mark.usefixtures("block_family")
def test_parts_that_are_none_or_shared_survive():
    model = Block(bias=False)
    model.attn.again = model.attn.out_proj
    tokens = torch.randn(VIDEOS * FRAMES, 10, DIM)
    expected, layer, names = model(tokens), model.attn, list(model.state_dict())
    tm.mix_tokens(model, FRAMES, "spatial")
    assert torch.allclose(model(tokens), expected, atol=1e-6)
    assert list(model.state_dict()) == names
    assert tm.unmix_tokens(model).attn is layer
    assert layer.again is layer.out_proj
    assert torch.equal(model(tokens), expected)


@pytest.mark.interfaces
def test_hooks_on_a_layer_go_on_firing():
    model, seen = make("BLIP"), []
    layer = model.encoder.layers[-1].self_attn
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    run("BLIP", tm.mix_tokens(model, FRAMES))
    assert len(seen) == 1
    handle.remove()
    run("BLIP", model)
    assert len(seen) == 1


@pytest.mark.interfaces
def test_backward_hooks_on_a_layer_go_on_firing():
    model, seen = make("BLIP"), []
    layer = model.encoder.layers[-1].self_attn
    layer.register_full_backward_hook(lambda module, *grads: seen.append((module, len(grads))))
    run("BLIP", tm.mix_tokens(model, FRAMES)).sum().backward()
    assert seen == [(model.encoder.layers[-1].self_attn, 2)]
    tm.unmix_tokens(model)
    run("BLIP", model).sum().backward()
    assert seen[1:] == [(layer, 2)]


def test_a_declaration_that_does_not_fit_is_named():
    kept = list(FAMILIES)
    blip = next(family for family in FAMILIES if family.name == "transformers BLIP")
    try:
        tm.register_family(replace(blip, output=("proj",)))
        with pytest.raises(ValueError, match="declares 'proj', which BlipAttention lacks"):
            tm.mix_tokens(make("BLIP"), FRAMES)
        tm.register_family(replace(blip, projection=PackedProjection("in_proj")))
        with pytest.raises(ValueError, match="declares 'in_proj', which BlipAttention lacks"):
            tm.mix_tokens(make("BLIP"), FRAMES)
        tm.register_family(replace(blip, attention="x.Y"))
        with pytest.raises(ValueError, match=r"BlipVisionModel holds no x\.Y"):
            tm.mix_tokens(make("BLIP"), FRAMES)
    finally:
        FAMILIES[:] = kept
    for wrong, text in (
        ({"towers": "a.B"}, "towers must be a tuple of names, got 'a.B'"),
        ({"attention": "Attention"}, "'Attention' must be a dotted class name: module.Class"),
        ({"projection": ("q", "k", "v")}, "projection must be a PackedProjection, "),
    ):
        with pytest.raises(ValueError, match=text):
            replace(blip, **wrong)
