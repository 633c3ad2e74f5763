"""Checkpoints hold what was updated, fit one model, and fail with a sentence; exports are whole."""

import errno
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from tokenmix_ops import mix_tokens
from tokenmix_ops.video import checkpoints
from tokenmix_ops.video.blip import tiny_blip
from tokenmix_ops.video.captioning import VideoCaptioner
from tokenmix_ops.video.checkpoints import describe, load_updated, save_updated
from tokenmix_ops.video.export import export
from tokenmix_ops.video.retrieval import VideoRetriever
from tokenmix_ops.video.text import CaptionTokenizer
from tokenmix_ops.video.tuning import METHODS, Tuning, apply
from tokenmix_ops.video.weights import load_blip

FRAMES, SIZE, WORDS = 3, 40, 60
INSERTING = {"full", "temporal", "dual_attention", "st_adapter", "adapter"}


def blip(task="captioning", seed=0, **other):
    torch.manual_seed(seed)
    return tiny_blip(task, WORDS, image_size=SIZE, vision_layers=2, **other).eval()


def fresh(task="captioning", seed=0, num_frames=FRAMES):
    if task == "captioning":
        return VideoCaptioner(blip(task, seed), num_frames=num_frames)
    return VideoRetriever(blip(task, seed), num_frames=num_frames)


def tuned(method="token_mixing", task="captioning", **other):
    """A model whose updated parameters have moved, as by training."""
    model = fresh(task)
    apply(model, Tuning(method, **other))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def outputs(model):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, FRAMES, 3, SIZE, SIZE, generator=generator)
    ids = torch.randint(5, WORDS - 2, (2, 6), generator=generator)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        if isinstance(model, VideoCaptioner):
            return model(pixels, ids, mask)
        encoded = model.encode_videos(pixels)
        logits = model.match(ids, mask, model.remember(encoded.tokens))
        return torch.cat([encoded.embedding, model.embed_texts(ids, mask), logits], dim=1)


@pytest.mark.interfaces
@pytest.mark.parametrize("task", ["captioning", "retrieval"])
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"frozen"}))
def test_a_checkpoint_brings_the_model_back_bit_for_bit(tmp_path, method, task):
    model = tuned(method, task)
    path = tmp_path / "best.safetensors"
    save_updated(path, model, base="base", settings={"a": [1]}, figures={"score": 2.0})
    again = fresh(task)
    description = load_updated(again, path)
    assert torch.equal(outputs(again.eval()), outputs(model))
    assert not torch.equal(outputs(again), outputs(fresh(task)))
    assert description.tuning.method == method
    assert (description.settings, description.figures) == ({"a": [1]}, {"score": 2.0})
    held = load_file(path)
    assert held.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in again.named_parameters() if p.requires_grad} == held.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["best.safetensors"]


def test_the_visual_part_of_token_mixing_is_one_layer(tmp_path):
    model = tuned()
    save_updated(tmp_path / "a.safetensors", model, base="base")
    layers = [n for n in load_file(tmp_path / "a.safetensors") if ".encoder.layers." in n]
    assert layers
    assert all(".encoder.layers.1." in name for name in layers)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: fresh("retrieval"), "with task=captioning, but the model has task=retrieval"),
        (lambda: fresh(num_frames=4), "with num_frames=3, but the model has num_frames=4"),
        (lambda: fresh(seed=5), "was tuned on other weights: on base"),
        (
            lambda: VideoCaptioner(
                tiny_blip("captioning", WORDS, image_size=56), num_frames=FRAMES
            ),
            "with image_size=40, but the model has image_size=56",
        ),
    ],
    ids=["task", "frames", "weights", "size"],
)
def test_a_model_that_does_not_fit_is_told_what_differs(tmp_path, make, text):
    path = tmp_path / "a.safetensors"
    save_updated(path, tuned(), base="base")
    with pytest.raises(ValueError, match=text) as error:
        load_updated(make(), path)
    assert str(path) in str(error.value)


def rewritten(path, change_tensors=None, **metadata):
    with safe_open(path, "pt") as file:
        kept = file.metadata()
    tensors = load_file(path)
    if change_tensors is not None:
        change_tensors(tensors)
    save_file(tensors, path, {**kept, **metadata})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(sorted(t)[0]), "it lacks "),
        (lambda t: t.update(stranger=torch.zeros(1)), "it has besides stranger"),
        (
            lambda t: t.update({k: v[:1] for k, v in t.items() if k.endswith("qkv.weight")}),
            r"qkv.weight is \[1, 64\], the model's \[192, 64\]",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_names_and_shapes_must_fit(tmp_path, change, text):
    path = tmp_path / "a.safetensors"
    save_updated(path, tuned(), base="base")
    rewritten(path, change)
    with pytest.raises(ValueError, match=text):
        load_updated(fresh(), path)


@pytest.mark.interfaces
def test_files_that_are_none_of_ours(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="does not exist"):
        describe(path)
    save_updated(path, tuned(), base="base")
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is cut off or not a safetensors file"):
            describe(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match=r"no checkpoint of tokenmix_ops: expected format .*, got None"
    ):
        describe(path)
    save_updated(path, tuned(), base="base")
    for broken in ({"tuning": "{"}, {"num_frames": "many"}, {"tuning": '{"method": "magic"}'}):
        rewritten(path, **broken)
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            load_updated(fresh(), path)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    model = tuned()
    save_updated(path, model, base="base")
    before = path.read_bytes()

    def half(tensors, file, metadata):
        file.write_bytes(before[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", half)
    with pytest.raises(OSError, match=r"a\.safetensors could not be written.*No space left"):
        save_updated(path, model, base="base")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_last_bits_of_resized_positions_do_not_tell_a_model(tmp_path):
    path = tmp_path / "a.safetensors"
    save_updated(path, tuned(linear_projection=False), base="base")
    for name, fits in (("position_embedding", True), ("class_embedding", False)):
        model = fresh()
        with torch.no_grad():
            getattr(model.encoder.vision_model.embeddings, name).mul_(1.001)
        if fits:
            load_updated(model, path)
        else:
            with pytest.raises(ValueError, match="was tuned on other weights"):
                load_updated(model, path)


def test_only_tuned_models_are_saved_and_only_fresh_ones_loaded(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="was not tuned"):
        save_updated(path, fresh(), base="base")
    save_updated(path, tuned(), base="base")
    with pytest.raises(ValueError, match="was tuned by token_mixing already"):
        load_updated(tuned(), path)


@pytest.mark.interfaces
@pytest.mark.parametrize("task", ["captioning", "retrieval"])
@pytest.mark.parametrize("method", sorted(METHODS.keys() - INSERTING))
def test_an_export_is_a_whole_model_of_transformers(tmp_path, method, task):
    model = tuned(method, task)
    tokenizer = CaptionTokenizer.from_captions(["a red circle moves left"])
    folder = export(model, tmp_path / "whole", tokenizer)
    kind = BlipForConditionalGeneration if task == "captioning" else BlipForImageTextRetrieval
    plain, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    noted = json.loads((folder / "config.json").read_text())["tokenmix"]
    assert noted["num_frames"] == FRAMES
    assert f"mix_tokens(model.vision_model, {FRAMES}, " in (folder / "README.md").read_text()
    assert noted["layers"] == ([1] if method == "token_mixing" else [])
    if noted["layers"]:
        mix_tokens(plain.vision_model, FRAMES, noted["mixing"], noted["layers"])
    pixels = torch.randn(2, FRAMES, 3, SIZE, SIZE)
    with torch.no_grad():
        wanted = model.encoder(pixels).tokens.flatten(0, 1)
        given = plain.vision_model(pixel_values=pixels.flatten(0, 1)).last_hidden_state
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)
    assert CaptionTokenizer.from_pretrained(folder).decode([[0]]) == [""]
    assert load_blip(folder, task) is not None


def test_an_export_leaves_the_model_and_what_is_there_alone(tmp_path):
    model = tuned()
    before = model.blip_config.to_dict()
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty")
    assert model.blip_config.to_dict() == before
    assert (tmp_path / "empty" / "model.safetensors").exists()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for name in ("file", "full", "empty"):
        with pytest.raises(OSError, match=rf"{name} is there already"):
            export(model, tmp_path / name)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_an_export_that_fails_leaves_nothing(tmp_path):
    class Full:
        def save(self, folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        export(tuned(), tmp_path / "whole", Full())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", sorted(INSERTING))
def test_what_transformers_cannot_hold_is_not_exported(tmp_path, method):
    with pytest.raises(ValueError, match=f"method '{method}' inserts modules"):
        export(tuned(method), tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
