"""The video encoder against plain models, and what it says of checkpoints that do not fit."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import interpolate
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

import tokenmix_ops as tm
from tokenmix_ops.testing import max_error
from tokenmix_ops.video import VideoEncoder, VideoEncoding, blip_vision_config
from tokenmix_ops.video import weights as reading

BATCH, FRAMES, DIM, HEADS, LAYERS, PATCH, SIZE = 2, 4, 24, 3, 2, 8, 24
TOKENS = 1 + (SIZE // PATCH) ** 2
VISION = dict(
    hidden_size=DIM,
    intermediate_size=2 * DIM,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    image_size=SIZE,
    patch_size=PATCH,
)
TEXT = dict(
    vocab_size=20,
    hidden_size=DIM,
    encoder_hidden_size=DIM,
    intermediate_size=2 * DIM,
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    max_position_embeddings=16,
)


def redraw(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def clip(size=SIZE, num_frames=FRAMES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, num_frames, 3, size, size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def encoder(**arguments):
    arguments = {"num_frames": FRAMES, **arguments}
    return redraw(VideoEncoder(blip_vision_config(**VISION), **arguments))


@pytest.mark.parametrize(
    ("architecture", "size", "parameters"),
    [
        ("vit-b16", 224, 85_798_656),
        ("vit-l16", 224, 303_301_632),
        ("vit-b16", 384, 85_798_656 + (24**2 - 14**2) * 768),
    ],
)
def test_parameters_are_those_of_blip(architecture, size, parameters):
    with torch.device("meta"):
        model = VideoEncoder(blip_vision_config(architecture, image_size=size))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {name.partition(".")[0] for name in model.state_dict()} == {"vision_model"}


@pytest.mark.parametrize("mixing", ["released", "paper", "spatial", "adjacent", "temporal"])
def test_a_clip_becomes_tokens_and_their_mean_class_token(mixing):
    output = encoder(mixing=mixing, mixing_layers="all")(clip())
    assert isinstance(output, VideoEncoding)
    assert output.tokens.shape == (BATCH, FRAMES, TOKENS, DIM)
    assert output.pooled.shape == (BATCH, DIM)
    assert max_error(output.pooled, sum(output.tokens[:, t, 0] for t in range(4)) / 4) < 1e-6


@pytest.mark.interfaces
def test_all_layers_run_on_the_operator_and_the_chosen_ones_mix():
    model = encoder(mixing="paper", mixing_layers=(0,))
    kinds = [layer.self_attn.mixing.kind for layer in model.vision_model.encoder.layers]
    assert kinds == ["paper", "spatial"]
    assert model.config is model.vision_model.config


def test_videos_of_a_batch_do_not_see_each_other():
    model = encoder().double()
    pixels = clip(dtype=torch.float64)
    assert max_error(model(pixels[1:]).tokens, model(pixels).tokens[1:]) < 1e-12


def test_every_parameter_gets_a_gradient():
    model = encoder()
    output = model(clip())
    (output.tokens.square().sum() + output.pooled.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or "qkv.bias" in name, name


def test_the_number_of_frames_can_change():
    model = encoder()
    assert model.set_num_frames(3) is model
    pixels = clip(num_frames=3)
    assert torch.equal(model(pixels).tokens, encoder(num_frames=3)(pixels).tokens)
    with pytest.raises(ValueError, match="num_frames must be a whole number, at least 1, got 0"):
        model.set_num_frames(0)
    assert model.num_frames == 3
    model(pixels)


WRONG_PIXELS = {
    "dimensions": (BATCH * FRAMES, 3, SIZE, SIZE),
    "frames": (BATCH, 5, 3, SIZE, SIZE),
    "channels": (BATCH, FRAMES, 1, SIZE, SIZE),
    "channels last": (BATCH, FRAMES, SIZE, SIZE, 3),
    "height": (BATCH, FRAMES, 3, 32, SIZE),
    "width": (BATCH, FRAMES, 3, SIZE, 16),
}


@pytest.mark.parametrize("wrong", WRONG_PIXELS)
def test_wrong_pixels_are_named(wrong):
    shape = WRONG_PIXELS[wrong]
    with pytest.raises(ValueError) as error:
        encoder()(torch.zeros(shape))
    assert str(error.value) == (
        "expected pixels [batch, num_frames, 3, height, width] = ['batch', 4, 3, 24, 24], got "
        f"{list(shape)}: call VideoEncoder.set_num_frames to change the frames, or build the "
        "encoder with another image_size"
    )


WRONG_BUILDS = {
    "mixing": (
        lambda: encoder(mixing="mixed"),
        "mixing must be a Mixing or one of 'paper', 'released', 'spatial', 'adjacent', "
        "'temporal', 'joint', got 'mixed'",
    ),
    "layer": (
        lambda: encoder(mixing_layers=(2,)),
        "layer 2 does not exist: the tower has 2 layers",
    ),
    "layers": (
        lambda: encoder(mixing_layers="last"),
        "layers must be a sequence of layer numbers or 'all', got 'last'",
    ),
    "frames": (
        lambda: encoder(num_frames=0),
        "num_frames must be a whole number, at least 1, got 0",
    ),
    "dropout": (
        lambda: VideoEncoder(blip_vision_config(attention_dropout=0.1, **VISION)),
        "token mixing has no attention dropout, but BlipAttention has dropout = 0.1; build the "
        "model with 0",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_BUILDS)
def test_wrong_builds_are_named(wrong, assert_says):
    assert_says(*WRONG_BUILDS[wrong])


def blip_config():
    return BlipConfig(text_config=TEXT, vision_config=VISION)


SAVED = {
    "captioner": lambda: BlipForConditionalGeneration(blip_config()),
    "retriever": lambda: BlipForImageTextRetrieval(blip_config()),
    "tower": lambda: BlipVisionModel(BlipVisionConfig(**VISION)),
}


@pytest.fixture(scope="module", params=SAVED)
def saved(request, tmp_path_factory):
    """A directory that transformers wrote, and the vision tower in it."""
    model = redraw(SAVED[request.param]())
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    return directory, model if request.param == "tower" else model.vision_model


def tower_tokens(tower, pixels, **arguments):
    hidden = tower(pixels.flatten(0, 1), **arguments).last_hidden_state
    return hidden.unflatten(0, pixels.shape[:2])


@pytest.mark.interfaces
def test_a_saved_transformers_model_is_read(saved):
    directory, tower = saved
    model = VideoEncoder.from_pretrained(directory, num_frames=FRAMES, mixing="spatial")
    assert max_error(model(clip()).tokens, tower_tokens(tower, clip()).double()) < 1e-5
    for name, value in model.vision_model.state_dict().items():
        assert torch.equal(value, tower.state_dict()[name])
    mixed = VideoEncoder.from_pretrained(
        str(directory), num_frames=2, mixing="paper", mixing_layers="all"
    )
    kinds = [layer.self_attn.mixing.kind for layer in mixed.vision_model.encoder.layers]
    assert (kinds, mixed.num_frames) == (["paper", "paper"], 2)


def test_a_saved_model_is_read_at_another_size(saved):
    directory, tower = saved
    arguments = dict(num_frames=FRAMES, mixing_layers=())
    model = VideoEncoder.from_pretrained(directory, image_size=40, **arguments)
    expected = tower_tokens(tower, clip(40), interpolate_pos_encoding=True)
    assert expected.shape[2] == 26
    assert max_error(model(clip(40)).tokens, expected.double()) < 1e-5


@pytest.mark.interfaces
def test_missing_weights_are_named(saved):
    directory, _ = saved
    file = directory / "model.safetensors"
    weights = load_file(file)
    ends = ("layers.1.self_attn.qkv.bias", "post_layernorm.weight")
    lacking = {n: w for n, w in weights.items() if not n.endswith(ends)}
    assert len(weights) - len(lacking) == 2
    save_file(lacking, file, metadata={"format": "pt"})
    try:
        with pytest.raises(ValueError) as error:
            VideoEncoder.from_pretrained(directory)
    finally:
        save_file(weights, file, metadata={"format": "pt"})
    names = [n for n in weights if n not in lacking]
    assert re.fullmatch(
        rf"{re.escape(str(directory))} does not fit Blip\w+: missing {', '.join(sorted(names))}",
        str(error.value),
    )


@pytest.mark.interfaces
def test_vision_weights_left_over_or_of_another_shape_are_named(saved):
    directory, _ = saved
    file = directory / "model.safetensors"
    weights = load_file(file)
    prefix = "" if "post_layernorm.weight" in weights else "vision_model."
    changes = {"adapter.weight": torch.zeros(2), "post_layernorm.bias": torch.zeros(7)}
    changed = {f"{prefix}{name}": weight for name, weight in changes.items()}
    save_file({**weights, **changed}, file, metadata={"format": "pt"})
    try:
        with pytest.raises(ValueError) as error:
            VideoEncoder.from_pretrained(directory)
    finally:
        save_file(weights, file, metadata={"format": "pt"})
    assert str(error.value).endswith(
        f"unexpected {prefix}adapter.weight; "
        f"shapes {prefix}post_layernorm.bias: expected [24], got [7]"
    )


def test_missing_weights_of_text_do_not_matter(tmp_path):
    model = redraw(SAVED["captioner"]())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {n: w for n, w in load_file(file).items() if n.startswith("vision_model.")}
    save_file(weights, file, metadata={"format": "pt"})
    read = VideoEncoder.from_pretrained(tmp_path, num_frames=FRAMES, mixing="spatial")
    assert torch.equal(
        read.vision_model.post_layernorm.weight, model.vision_model.post_layernorm.weight
    )


def test_another_model_is_refused(tmp_path):
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        VideoEncoder.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{tmp_path} must be a Blip")
    assert ", got a clip_vision_model model; " in str(error.value)


@pytest.mark.parametrize("kind", ["blip_text_model", "blip_2_vision_model", "blip-2"])
def test_other_blip_like_models_are_refused(kind, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(ValueError) as error:
        VideoEncoder.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{tmp_path} must be a Blip")
    assert f", got a {kind} model; " in str(error.value)


def test_a_directory_that_does_not_exist_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="nowhere does not exist; from_pretrained takes a model dir"):
        VideoEncoder.from_pretrained(tmp_path / "nowhere")


def test_a_hub_name_is_asked_of_the_hub(saved, monkeypatch):
    directory, tower = saved
    folders = {"someone/blip": directory}
    monkeypatch.setattr(reading, "model_folder", lambda model, files, advice: folders[model])
    model = VideoEncoder.from_pretrained("someone/blip", num_frames=FRAMES)
    assert torch.equal(model.vision_model.post_layernorm.bias, tower.post_layernorm.bias)


def test_half_precision_becomes_float32_ready_to_train(saved, tmp_path):
    directory, tower = saved
    half = type(tower)(tower.config).half()
    half.save_pretrained(tmp_path)
    for model in (VideoEncoder.from_pretrained(tmp_path), VideoEncoder.from_pretrained(directory)):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert all(p.requires_grad for p in model.parameters())
        assert all(module.training for module in model.modules())


class PlainAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x, mixes):
        """With ``mixes``, all tokens of the video are keys, those that are not chosen masked."""
        num_tokens = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if not mixes:
            weights = (q @ k.transpose(-1, -2) * (DIM // HEADS) ** -0.5).softmax(-1)
            return self.proj((weights @ v).transpose(1, 2).flatten(2))
        q, k, v = (t.unflatten(0, (-1, FRAMES)).transpose(1, 2).flatten(2, 3) for t in (q, k, v))
        frame = torch.arange(FRAMES).repeat_interleave(num_tokens)
        token = torch.arange(num_tokens).repeat(FRAMES)
        chosen = (token == 0) | ((token - 1) % FRAMES == frame)
        foreign = (frame[:, None] != frame) & (token > 0)
        logits = q @ k.transpose(-1, -2) * (DIM // HEADS) ** -0.5
        logits = torch.where(foreign, 0.8 * logits, logits).masked_fill(~chosen, -torch.inf)
        mixed = (logits.softmax(-1) @ v).unflatten(2, (FRAMES, num_tokens))
        return self.proj(mixed.permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 1))


class PlainBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(DIM, eps=1e-6) for _ in range(2))
        self.attn = PlainAttention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(DIM, 4 * DIM), "fc2": nn.Linear(4 * DIM, DIM)})

    def forward(self, x, mixes):
        x = x + self.attn(self.norm1(x), mixes)
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainViT(nn.Module):
    """The vision transformer of the published BLIP, with the names of its checkpoints."""

    def __init__(self, size=SIZE):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // PATCH) ** 2, DIM))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, DIM, PATCH, PATCH)})
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM, eps=1e-6)

    def forward(self, frames, mixing_layers=()):
        x = self.patch_embed["proj"](frames).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for number, block in enumerate(self.blocks):
            x = block(x, mixes=number in mixing_layers)
        return self.norm(x)


def original(prefix="visual_encoder."):
    """An original checkpoint, and the model that it belongs to."""
    model = redraw(PlainViT())
    return model, {prefix + name: weight for name, weight in model.state_dict().items()}


def from_original(state_dict, **arguments):
    arguments = (
        dict(image_size=SIZE, num_heads=HEADS, patch_size=PATCH, num_frames=FRAMES) | arguments
    )
    return VideoEncoder.from_blip_state_dict(state_dict, **arguments)


@pytest.mark.interfaces
@pytest.mark.parametrize("mixing_layers", [(), (1,), (0, 1)], ids=str)
def test_an_original_checkpoint_gives_what_the_original_model_gives(mixing_layers):
    plain, weights = original()
    model = from_original(weights, mixing_layers=mixing_layers).double()
    pixels = clip(dtype=torch.float64)
    expected = plain.double()(pixels.flatten(0, 1), mixing_layers)
    assert max_error(model(pixels).tokens.flatten(0, 1), expected) < 1e-11
    other = plain(pixels.flatten(0, 1), () if mixing_layers else (1,))
    assert max_error(other, expected) > 1e-3


def as_given(weights, path):
    return weights


def under_model(weights, path):
    return {"model": weights, "epoch": 3}


def without_prefix(weights, path):
    return {name.removeprefix("visual_encoder."): weight for name, weight in weights.items()}


def with_text(weights, path):
    others = ("text_decoder.bert.embeddings.word_embeddings.weight", "temp", "visual_encoder_m.x")
    return {**dict.fromkeys(others, torch.zeros(2)), **weights}


def as_file(weights, path):
    torch.save({"model": with_text(weights, path)}, path)
    return path


def as_file_name(weights, path):
    torch.save(weights, path)
    return str(path)


def as_old_file(weights, path):
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    return path


FORMS = (as_given, under_model, without_prefix, with_text, as_file, as_file_name, as_old_file)


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_come_in_several_forms(form, tmp_path):
    plain, weights = original()
    model = from_original(form(weights, tmp_path / "blip.pth"), mixing="spatial")
    expected = plain(clip().flatten(0, 1))
    assert max_error(model(clip()).tokens.flatten(0, 1), expected.double()) < 1e-4
    assert model.config.layer_norm_eps == 1e-6


def test_the_weights_given_are_not_those_trained():
    _, weights = original()
    before = {name: weight.clone() for name, weight in weights.items()}
    model = from_original(weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert all(module.training for module in model.modules())


def test_entries_beside_the_tower_may_be_anything():
    _, weights = original()
    assert from_original({**weights, "epoch": 3, 5: None})
    with pytest.raises(
        ValueError, match=r"holds entries that are not tensors: visual_encoder\.norm"
    ):
        from_original({**weights, "visual_encoder.norm": 3})


@pytest.mark.interfaces
@pytest.mark.parametrize("size", [16, 40, 96])
def test_position_embeddings_of_another_grid_are_resized(size):
    _, weights = original()
    model = from_original(weights, image_size=size)
    given = weights["visual_encoder.pos_embed"]
    grid = given[0, 1:].T.reshape(1, DIM, 3, 3)
    wanted = interpolate(grid, size=(size // PATCH,) * 2, mode="bicubic", align_corners=False)
    embedding = model.vision_model.embeddings.position_embedding
    assert torch.equal(embedding[:, 0], given[:, 0])
    assert max_error(embedding[0, 1:].T, wanted[0].flatten(1).double()) < 1e-6
    assert model(clip(size)).tokens.shape[2] == 1 + (size // PATCH) ** 2


def changed(remove=(), **added):
    _, weights = original()
    for name in remove:
        del weights["visual_encoder." + name]
    new = {"visual_encoder." + n.replace("__", "."): w for n, w in added.items()}
    return {**weights, **new}


WRONG_CHECKPOINTS = {
    "patch size": (
        lambda: from_original(changed(), patch_size=6),
        "expected patch_size=8, as in state_dict, got 6",
    ),
    "image size": (
        lambda: from_original(changed(), image_size=28),
        "expected image_size to be a multiple of the patch size 8, got 28",
    ),
    "heads": (
        lambda: from_original(changed(), num_heads=5),
        "expected num_heads to divide 24, the width of state_dict, got 5",
    ),
    "missing": (
        lambda: from_original(changed(["blocks.1.attn.qkv.bias", "norm.weight"])),
        "state_dict does not fit BlipVisionModel: missing "
        "encoder.layers.1.self_attn.qkv.bias, post_layernorm.weight",
    ),
    "unexpected": (
        lambda: from_original(changed(blocks__0__attn__gate=torch.zeros(1))),
        "state_dict does not fit BlipVisionModel: unexpected blocks.0.attn.gate",
    ),
    "shape": (
        lambda: from_original(changed(blocks__0__norm1__bias=torch.zeros(7))),
        "state_dict does not fit BlipVisionModel: shapes encoder.layers.0.layer_norm1.bias: "
        "expected [24], got [7]",
    ),
    "all of it": (
        lambda: from_original(
            changed(["norm.bias"], norm__weight=torch.zeros(1), head=torch.zeros(1))
        ),
        "state_dict does not fit BlipVisionModel: missing post_layernorm.bias; unexpected head; "
        "shapes post_layernorm.weight: expected [24], got [1]",
    ),
    "no grid": (
        lambda: from_original(changed(pos_embed=torch.zeros(1, 9, DIM))),
        "state_dict does not fit BlipVisionModel: shapes embeddings.position_embedding: "
        "expected [1, 5, 24], got [1, 9, 24]",
    ),
    "a layer between": (
        lambda: from_original(
            {n.replace("blocks.1.", "blocks.2."): w for n, w in changed().items()}
        ),
        "state_dict does not fit BlipVisionModel: missing encoder.layers.1.layer_norm1.bias, "
        "encoder.layers.1.layer_norm1.weight, encoder.layers.1.layer_norm2.bias, "
        "encoder.layers.1.layer_norm2.weight, encoder.layers.1.mlp.fc1.bias and 7 more",
    ),
    "another model": (
        lambda: from_original({"layer.weight": torch.zeros(2), "layer.bias": torch.zeros(2)}),
        "state_dict is not an original BLIP checkpoint: expected visual_encoder.cls_token etc., "
        "got layer.bias, layer.weight; for a model in transformers' format, pass its directory",
    ),
    "without prefix but with text": (
        lambda: from_original({"text_decoder.x": torch.zeros(1), **without_prefix(changed(), "")}),
        "state_dict does not fit BlipVisionModel: unexpected text_decoder.x",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_CHECKPOINTS)
def test_checkpoints_that_do_not_fit_are_told_why(wrong, assert_says):
    assert_says(*WRONG_CHECKPOINTS[wrong])


class Malicious:
    """What a pickle may do to whoever opens it in trust."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_truncated(path):
    torch.save(original()[1], path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


UNREADABLE = {
    "missing": (lambda path: None, "does not exist"),
    "directory": (lambda path: path.mkdir(), "cannot be read as a PyTorch checkpoint ("),
    "empty": (lambda path: path.touch(), "cannot be read as a PyTorch checkpoint ("),
    "truncated": (write_truncated, "cannot be read as a PyTorch checkpoint ("),
    "text": (
        lambda path: path.write_text("visual_encoder, a text\n"),
        "cannot be read as a PyTorch checkpoint (",
    ),
    "bytes": (
        lambda path: path.write_bytes(b"\x80\x02a" + bytes(range(256))),
        "cannot be read as a PyTorch checkpoint (",
    ),
    "another text": (
        lambda path: path.write_text("abort"),
        "cannot be read as a PyTorch checkpoint (",
    ),
    "plain pickle": (
        lambda path: path.write_bytes(pickle.dumps([1, 2], protocol=2)),
        "cannot be read as a PyTorch checkpoint (",
    ),
    "tensor": (
        lambda path: torch.save(torch.zeros(2), path),
        "must hold a mapping of weights, got a Tensor",
    ),
    "class": (
        lambda path: torch.save({"model": Malicious(path.parent / "touched")}, path),
        "cannot be read as a PyTorch checkpoint (UnpicklingError: Weights only load failed",
    ),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("file", UNREADABLE)
def test_files_that_are_no_checkpoint_are_refused(file, tmp_path):
    write, text = UNREADABLE[file]
    path = tmp_path / "blip.pth"
    write(path)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {text}')}"):
        from_original(path)
    assert not (tmp_path / "touched").exists()


def test_frames_are_those_of_the_layers():
    encoder = VideoEncoder(BlipVisionConfig(**VISION), num_frames=FRAMES)
    tm.set_num_frames(encoder, 2)
    assert encoder.num_frames == 2
    encoder(clip(num_frames=2))
    with pytest.raises(ValueError, match="expected pixels"):
        encoder(clip())
    tm.mix_tokens(encoder, FRAMES, layers=(0,))
    with pytest.raises(ValueError, match=r"expected one num_frames for all layers, got \[2, 4\]"):
        encoder(clip())


def test_only_blip_has_a_place(tmp_path):
    with pytest.raises(ValueError, match="or BlipVisionConfig, got CLIPVisionConfig"):
        VideoEncoder(CLIPVisionConfig(**VISION))
    model = redraw(BlipVisionModel(BlipVisionConfig(**VISION)))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for architectures, text in (
        (["Nonsense"], "or BlipVisionModel, got a Nonsense model; "),
        (None, None),
    ):
        config["architectures"] = architectures
        (tmp_path / "config.json").write_text(json.dumps(config))
        if text is None:
            assert VideoEncoder.from_pretrained(tmp_path, num_frames=FRAMES)
        else:
            with pytest.raises(ValueError, match=text):
                VideoEncoder.from_pretrained(tmp_path)
