"""Loading BLIP: both tasks, all formats, nothing missing or left over; and hostile files."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate
from transformers import BlipForQuestionAnswering, CLIPVisionConfig, CLIPVisionModel

from tokenmix_ops.testing import max_error
from tokenmix_ops.video.blip import TRAINING, blip_config, build_blip, tiny_blip
from tokenmix_ops.video.weights import load_blip, resize_position_embedding, set_image_size

pytestmark = pytest.mark.interfaces

TASKS = ("captioning", "retrieval")
SIZE, PATCH, WORDS = 24, 8, 40


def random_blip(task, **text):
    config = blip_config(
        "vit-b16",
        task,
        image_size=SIZE,
        vocab_size=WORDS,
        vision=dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=2, patch_size=PATCH),
        text=dict(
            hidden_size=64, num_hidden_layers=2, max_position_embeddings=16, sep_token_id=3,
            eos_token_id=3, **text,
        ),
        image_text_hidden_size=24,
    )  # fmt: skip
    model = build_blip(config, task).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def to_original_names(model):
    """The weights under the names of BLIP's own checkpoints."""
    renamed = {}
    for name, weight in model.state_dict().items():
        if name.startswith("vision_model."):
            for old, new in (
                ("vision_model.", "visual_encoder."),
                ("embeddings.class_embedding", "cls_token"),
                ("embeddings.position_embedding", "pos_embed"),
                ("embeddings.patch_embedding", "patch_embed.proj"),
                ("post_layernorm", "norm"),
                ("encoder.layers", "blocks"),
                ("layer_norm", "norm"),
                ("self_attn", "attn"),
                ("projection", "proj"),
            ):
                name = name.replace(old, new)
        renamed[name] = weight.clone()
    return renamed


def with_training_state(weights):
    """A checkpoint as BLIP's training writes it: with all that the model itself does not need."""
    momentum = {
        re.sub(r"^(visual_encoder|text_encoder|vision_proj|text_proj)\.", r"\1_m.", name): weight
        for name, weight in weights.items()
    }
    text = "text_encoder" if "text_proj.bias" in weights else "text_decoder.bert"
    extra = {
        f"{text}.embeddings.position_ids": torch.arange(16)[None],
        **{name: w + 1 for name, w in momentum.items() if "_m." in name},
        "image_queue": torch.randn(24, 8),
        "text_queue": torch.randn(24, 8),
        "idx_queue": torch.full((1, 8), -100),
        "ptr_queue": torch.zeros(1, dtype=torch.long),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
        "temp": torch.tensor(0.05),
    }
    return {"model": {**weights, **extra}, "optimizer": {"state": {}}, "epoch": 3}


def outputs(model, size=SIZE):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    ids = torch.randint(5, WORDS, (2, 6), generator=generator)
    with torch.no_grad():
        if hasattr(model, "text_decoder"):
            return [model(pixel_values=pixels, input_ids=ids).logits]
        return [model(ids, pixels, use_itm_head=head).itm_score for head in (True, False)]


def same(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_an_original_checkpoint_is_loaded_bit_for_bit(task, tmp_path):
    model = random_blip(task)
    file = tmp_path / "model.pth"
    torch.save(with_training_state(to_original_names(model)), file)
    loaded = load_blip(file, task)
    same(loaded, model)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for part in ("text_config", "vision_config"):
        found, wanted = (getattr(m.config, part).to_dict() for m in (loaded, model))
        # [SEP] is BLIP's own, 102, whatever the vocabulary.
        varying = {"eos_token_id", "sep_token_id", "dtype"}
        differing = {key for key in wanted if found[key] != wanted[key]}
        assert differing <= varying, differing


@pytest.mark.parametrize("task", TASKS)
def test_a_pre_training_checkpoint_serves_either_task(task, tmp_path):
    both = {**to_original_names(random_blip("captioning"))}
    both.update(to_original_names(random_blip("retrieval")))
    torch.save(both, tmp_path / "model.pth")
    loaded = load_blip(tmp_path / "model.pth", task)
    assert hasattr(loaded, "text_decoder") == (task == "captioning")
    text = loaded.text_decoder.bert if task == "captioning" else loaded.text_encoder
    name = "text_decoder.bert" if task == "captioning" else "text_encoder"
    key = text.encoder.layer[1].crossattention.self.key.weight
    assert torch.equal(key, both[f"{name}.encoder.layer.1.crossattention.self.key.weight"])


@pytest.mark.parametrize("task", TASKS)
def test_half_precision_becomes_float32(task, tmp_path):
    model = random_blip(task).half()
    model.save_pretrained(tmp_path / "folder")
    torch.save(to_original_names(model), tmp_path / "model.pth")
    for place in ("folder", "model.pth"):
        same(load_blip(tmp_path / place, task), model.float())


@pytest.mark.parametrize("task", TASKS)
def test_a_directory_is_loaded_bit_for_bit_and_trains_as_blip(task, tmp_path):
    published = dict.fromkeys(TRAINING, 0.0)
    model = random_blip(task, num_attention_heads=4, **published)
    model.save_pretrained(tmp_path)
    loaded = load_blip(str(tmp_path), task)
    same(loaded, model)
    text = loaded.config.text_config
    assert text.num_attention_heads == 4
    assert {name: getattr(text, name) for name in TRAINING} == TRAINING
    dropouts = [m.p for n, m in loaded.named_modules() if n.endswith("dropout") and "text" in n]
    assert set(dropouts) == {0.1}
    assert len(dropouts) == 1 + 2 * (2 * 2 + 1)
    if task == "captioning":
        assert loaded.text_decoder.label_smoothing == 0.1


def test_a_directory_that_says_it_is_no_decoder_keeps_its_cross_attention(tmp_path):
    model = random_blip("retrieval")
    model.config.text_config.is_decoder = False
    model.save_pretrained(tmp_path)
    same(load_blip(tmp_path, "retrieval"), model)


@pytest.mark.parametrize("kind", ["folder", "model.pth"])
def test_position_embeddings_are_resized(kind, tmp_path):
    model = random_blip("captioning")
    model.save_pretrained(tmp_path / "folder")
    torch.save(to_original_names(model), tmp_path / "model.pth")
    loaded = load_blip(tmp_path / kind, "captioning", image_size=40)
    old = model.vision_model.embeddings.position_embedding.detach()
    grid = old[0, 1:].T.reshape(1, 128, 3, 3)
    grid = interpolate(grid, size=(5, 5), mode="bicubic", align_corners=False)
    new = loaded.vision_model.embeddings.position_embedding
    assert torch.equal(new[:, :1], old[:, :1])
    assert torch.allclose(new[0, 1:], grid.reshape(128, 25).T)
    assert new.requires_grad
    assert loaded.config.vision_config.image_size == loaded.vision_model.config.image_size == 40
    assert outputs(loaded, 40)[0].shape == (2, 6, WORDS)
    loaded.save_pretrained(tmp_path / "again")
    again = load_blip(tmp_path / "again", "captioning")
    assert torch.equal(outputs(again, 40)[0], outputs(loaded, 40)[0])


def test_an_image_size_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="image_size to be a multiple of the patch size 8, got 50"):
        set_image_size(tiny_blip("captioning", WORDS).vision_model, 50)


def test_the_grid_of_384_becomes_that_of_224():
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(1, 1 + 24 * 24, 5, generator=generator)
    resized = resize_position_embedding(embedding, 14)
    assert resized.shape == (1, 197, 5)
    patches = embedding[:, 1:].reshape(1, 24, 24, 5).permute(0, 3, 1, 2)
    wanted = interpolate(patches, size=(14, 14), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    assert max_error(resized[:, 1:], wanted.double()) < 1e-6
    assert torch.equal(resized[:, :1], embedding[:, :1])
    assert resize_position_embedding(embedding, 24) is embedding
    assert resize_position_embedding(embedding.half(), 14).dtype == torch.float16


@pytest.mark.parametrize("shape", [(1, 8, 5), (1, 1, 5), (1, 0, 5), (10, 5)], ids=str)
def test_position_embeddings_that_are_no_grid_are_refused(shape):
    with pytest.raises(ValueError) as error:
        resize_position_embedding(torch.zeros(shape), 3)
    text = f"expected a position embedding [1, 1 + n * n, dim], got {list(shape)}"
    assert str(error.value) == text


def damage(weights, how):
    name = "text_decoder.bert.encoder.layer.1.output.dense.weight"
    if how == "missing":
        del weights[name], weights["visual_encoder.norm.bias"]
        return f"missing {name}, vision_model.post_layernorm.bias"
    if how == "extra":
        weights["visual_encoder.blocks.0.adapter.weight"] = torch.zeros(2)
        return "unexpected vision_model.blocks.0.adapter.weight"
    if how == "width":
        name = "text_decoder.bert.encoder.layer.0.crossattention.self.key.weight"
        weights[name] = torch.zeros(64, 192)
        return f"shapes {name}: expected [64, 128], got [64, 192]"
    weights["text_decoder.cls.predictions.decoder.weight"].add_(1)
    return "BLIP ties text_decoder.cls.predictions.decoder"


@pytest.mark.parametrize("how", ["missing", "extra", "width", "untied"])
def test_an_original_checkpoint_that_does_not_fit_is_named(how, tmp_path):
    weights = to_original_names(random_blip("captioning"))
    message = damage(weights, how)
    file = tmp_path / "model.pth"
    torch.save(weights, file)
    with pytest.raises(ValueError) as error:
        load_blip(file, "captioning")
    assert str(error.value).startswith(f"{file} ")
    assert message in str(error.value)


@pytest.mark.parametrize("how", ["missing", "extra", "shape", "truncated", "gone", "config"])
def test_a_directory_that_does_not_fit_is_named(how, tmp_path):
    random_blip("retrieval").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    expected = f"{tmp_path} does not fit BlipForImageTextRetrieval: "
    if how == "missing":
        del weights["itm_head.bias"]
        expected += "missing itm_head.bias"
    elif how == "extra":
        weights["text_encoder.pooler.dense.bias"] = torch.zeros(64)
        weights["text_encoder.embeddings.position_ids"] = torch.arange(16)[None]
        expected += "unexpected text_encoder.pooler.dense.bias"
    elif how == "shape":
        weights["text_proj.bias"] = torch.zeros(25)
        expected += "shapes text_proj.bias: expected [24], got [25]"
    save_file(weights, file, metadata={"format": "pt"})
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
        expected = f"{tmp_path} has no readable weights (SafetensorError: "
    elif how == "gone":
        file.unlink()
        expected = f"{tmp_path} has no readable weights (OSError: "
    elif how == "config":
        (tmp_path / "config.json").write_text("{")
        expected = f"{tmp_path} has no readable config.json (OSError: "
    with pytest.raises(ValueError) as error:
        load_blip(tmp_path, "retrieval")
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("task", TASKS)
def test_the_other_task_is_refused(task, tmp_path):
    other = TASKS[TASKS.index(task) - 1]
    model = random_blip(other)
    model.save_pretrained(tmp_path / "folder")
    with pytest.raises(
        ValueError, match=f"folder must be a .*, got a {type(model).__name__} model"
    ):
        load_blip(tmp_path / "folder", task)
    torch.save(with_training_state(to_original_names(model)), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=rf"model\.pth is not a BLIP {task} checkpoint: it holds "):
        load_blip(tmp_path / "model.pth", task)


def test_other_models_are_refused(tmp_path):
    model = random_blip("captioning")
    BlipForQuestionAnswering(model.config).save_pretrained(tmp_path / "vqa")
    with pytest.raises(
        ValueError, match=r"vqa must be a Blip.*, got a BlipForQuestionAnswering model"
    ):
        load_blip(tmp_path / "vqa", "captioning")
    answering = {
        **to_original_names(model),
        **{n: w for n, w in to_original_names(random_blip("retrieval")).items() if "encoder" in n},
    }
    torch.save(answering, tmp_path / "vqa.pth")
    with pytest.raises(ValueError, match=r"unexpected text_encoder\."):
        load_blip(tmp_path / "vqa.pth", "captioning")
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    CLIPVisionModel(CLIPVisionConfig(**small)).save_pretrained(tmp_path / "clip")
    with pytest.raises(
        ValueError, match=r"clip must be a BlipFor.*, got a clip_vision_model model"
    ):
        load_blip(tmp_path / "clip", "captioning")


def test_damaged_and_foreign_files_are_named(tmp_path):
    file = tmp_path / "model.pth"
    torch.save(to_original_names(random_blip("captioning")), file)
    file.write_bytes(file.read_bytes()[:5000])
    foreign = {
        "model.pth": "cannot be read as a PyTorch checkpoint",
        "text.pth": "cannot be read as a PyTorch checkpoint",
        "empty.pth": "cannot be read as a PyTorch checkpoint",
        "list.pth": "must hold a mapping of weights, got a list",
        "other.pth": "is not an original BLIP checkpoint",
        "number.pth": "holds entries that are not tensors: visual_encoder.cls_token",
        "class.pth": "is not a BLIP captioning checkpoint: it holds vision_model but lacks text_",
    }
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"visual_encoder.cls_token": 3}, tmp_path / "number.pth")
    torch.save({"visual_encoder.cls_token": torch.zeros(2)}, tmp_path / "class.pth")
    for name, message in foreign.items():
        with pytest.raises(ValueError) as error:
            load_blip(tmp_path / name, "captioning")
        assert str(error.value).startswith(f"{tmp_path / name} {message}"), name


@pytest.mark.parametrize("dimension", ["pos_embed", "patch_embed.proj.weight"])
def test_a_size_that_cannot_be_read_is_named(dimension, tmp_path):
    weights = to_original_names(random_blip("captioning"))
    weights[f"visual_encoder.{dimension}"] = torch.zeros(())
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(
        ValueError, match=r"model\.pth does not fit BLIP: expected vision_model\.embeddings"
    ):
        load_blip(tmp_path / "model.pth", "captioning")


@pytest.mark.parametrize("model", ["Salesforce/blip-image-captioning-base", "no/such/x.pth", "x"])
def test_what_is_not_found_says_where_blip_is(model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: asked.append(address))
    with pytest.raises(ValueError) as error:
        load_blip(model, "captioning")
    assert not asked
    message = str(error.value)
    assert message.startswith(model)
    for part in (
        "--model",
        "--tiny",
        "Salesforce/blip-itm-base-coco",
        "github.com/salesforce/BLIP",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("task", TASKS)
def test_a_tiny_model_works_and_can_be_saved(task, tmp_path):
    model = tiny_blip(task, WORDS).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    assert all(output.isfinite().all() for output in outputs(model, 56))
    text = model.config.text_config
    assert (text.bos_token_id, text.sep_token_id, text.vocab_size) == (WORDS - 2, 3, WORDS)
    model.save_pretrained(tmp_path)
    loaded = load_blip(tmp_path, task)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, 56), outputs(loaded, 56)))  # noqa: B905


def test_a_wrong_task_is_named():
    with pytest.raises(
        ValueError, match="expected task to be 'captioning' or 'retrieval', got 'vqa'"
    ):
        load_blip("anything", "vqa")
