"""Modules of this package inside transformers' models: how they are called, now and one day."""

import copy
from types import SimpleNamespace

import caption_models
import pytest
import retrieval_models
import torch
from recorded_calls import Call, assert_answered_alike, pass_besides, record
from transformers.modeling_layers import GradientCheckpointingLayer

from tokenmix_ops.bench.published import as_published
from tokenmix_ops.testing import max_error
from tokenmix_ops.video.captioning import VideoCaptioner
from tokenmix_ops.video.cross_attention import CrossAttention, VideoMemory
from tokenmix_ops.video.engine.checkpointing import checkpoint_layers
from tokenmix_ops.video.layer import VideoLayer
from tokenmix_ops.video.retrieval import VideoRetriever
from tokenmix_ops.video.tuning import METHODS, Tuning, apply

pytestmark = pytest.mark.interfaces

TASKS = ("captioning", "retrieval")
CACHES = ("cache", "past_key_values")
"""What transformers calls its cache, from 5.24 on and before."""
VIDEOS, LENGTH = 2, 5
IDS = torch.arange(3, 3 + 2 * LENGTH).reshape(2, LENGTH)
TOLERANCE = 1e-11


def image_model(task):
    if task == "captioning":
        return caption_models.tiny_blip(seed=3)
    return retrieval_models.tiny_model().double().eval()


def video_model(task):
    """Over two frames, of which none mixes."""
    make = VideoCaptioner if task == "captioning" else VideoRetriever
    return make(image_model(task), num_frames=2).eval()


def is_ours(module):
    return type(module).__module__.startswith("tokenmix_ops.")


def replaced(model):
    """The outermost modules of this package inside other packages' modules, by name."""
    found = {}
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if is_ours(module) and not is_ours(parent):
            found[name] = module
    return found


def in_image_model(name):
    """What a module of a video model is called in the image model that it was made of."""
    return name.removeprefix("encoder.")


def frames():
    shape = 2 * VIDEOS, 3, *2 * (caption_models.SIZE,)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pixels(task):
    size = caption_models.SIZE if task == "captioning" else retrieval_models.SIZE
    return frames()[..., :size, :size]


def text_model(model):
    return model.text_decoder if hasattr(model, "text_decoder") else model.text_encoder


def run(task, model, videos):
    """Everything that this package has a text model do with videos, a tensor or a memory."""
    text, mask = text_model(model), torch.ones_like(IDS)
    if task == "retrieval":
        hidden = text(IDS, attention_mask=mask, encoder_hidden_states=videos).last_hidden_state
        return [hidden, text(IDS, attention_mask=mask).last_hidden_state]
    call = dict(attention_mask=mask, encoder_hidden_states=videos)
    start = dict(call, attention_mask=mask[:, :1], eos_token_id=2, pad_token_id=0)
    found = [text(IDS, use_cache=use_cache, **call).logits for use_cache in (False, True)]
    for strategy in (dict(num_beams=1), dict(num_beams=3, num_return_sequences=2)):
        found.append(text.generate(IDS[:, :1], max_length=8, **strategy, **start))
    return found


def tokens(task):
    width = 24 if task == "captioning" else 16
    generator = torch.Generator().manual_seed(2)
    return torch.randn(VIDEOS, 10, width, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module", params=TASKS)
def recorded(request):
    """The calls that transformers makes of what is replaced, and what replaces it, by name."""
    task = request.param
    plain, ours = image_model(task), video_model(task)
    modules = replaced(ours)
    names = {in_image_model(name): name for name in modules}
    calls = record(plain, list(names))
    with torch.no_grad():
        plain.vision_model(pixel_values=pixels(task))
        plain.vision_model(pixels(task), output_hidden_states=True, output_attentions=True)
        run(task, plain, tokens(task))
    return task, {names[n]: (modules[names[n]], found) for n, found in calls.items()}


def test_every_call_of_transformers_is_taken_and_answered_alike(recorded):
    _, modules = recorded
    assert {type(module) for module, _ in modules.values()} == {VideoLayer, CrossAttention}
    for module, calls in modules.values():
        assert len(calls) >= 1
        for call in calls:
            assert_answered_alike(module, call, TOLERANCE)


def test_arguments_of_versions_to_come_change_nothing(recorded):
    _, modules = recorded
    for module, calls in modules.values():
        call = calls[-1]
        wanted = module(*call.args, **call.kwargs)
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        more = dict(some_future_name=None, a_cache=SimpleNamespace(keys=tokens("retrieval")))
        more |= dict(a_flag=True, a_number=3, is_causal=False)
        if isinstance(module, CrossAttention):
            more |= dict(cache_position=torch.arange(3), position_ids=torch.arange(3))
            more |= dict(a_mask=torch.ones(2, 10).bool(), another_mask=torch.zeros(2, 1, 1, 10))
        given = module(*call.args, None, **call.kwargs, **more)
        assert torch.equal(given[0] if isinstance(given, tuple) else given, wanted)


@pytest.mark.parametrize("kind", [*TASKS, "published"])
def test_a_renamed_argument_breaks_nothing(kind):
    task = "retrieval" if kind == "retrieval" else "captioning"
    model, memory = video_model(task), VideoMemory(tokens(task))

    def work():
        tower = model.encoder.vision_model(pixel_values=pixels(task)).last_hidden_state
        if kind != "published":
            return [tower, *run(task, model, memory)]
        # It has one text a video, so no beams.
        call = dict(encoder_hidden_states=memory, use_cache=True)
        return [tower, text_model(model)(IDS, **call).logits]

    if kind == "published":
        as_published(model)
    with torch.no_grad():
        wanted = work()
        for module in replaced(model).values():
            names = dict.fromkeys(CACHES, "some_future_name")
            if isinstance(module, CrossAttention):
                names["encoder_hidden_states"] = "another_future_name"
            pass_besides(module, names, one_more=None)
        given = work()
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_what_could_change_the_result_is_refused(recorded):
    _, modules = recorded
    hides = torch.tensor([[True] * 9 + [False]])
    for module, calls in modules.values():
        call = calls[0]
        known = {n: v for n, v in call.kwargs.items() if n != "attention_mask"}
        for name, value in {
            "attention_mask": hides,
            "encoder_attention_mask": torch.where(hides, 0.0, -1e9),
            "some_future_mask": hides.long(),
            "position_embeddings": (torch.ones(10), torch.ones(10)),
            "other_states": tokens("retrieval"),
            "is_causal": True,
        }.items():
            with pytest.raises(
                ValueError, match=f"no attention mask and no other keys, got {name}"
            ):
                module(*call.args, **known, **{name: value})
        with pytest.raises(ValueError, match="got a second tensor"):
            module(call.args[0], hides, **known)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_only_these_kinds_stand_in_transformers_models(task, method):
    model = video_model(task)
    apply(model, Tuning(method, num_blocks=1) if method in ("full", "temporal") else Tuning(method))
    assert {type(module) for module in replaced(model).values()} == {VideoLayer, CrossAttention}
    # Whatever the method, the tower also runs as transformers runs it.
    with torch.no_grad():
        video = pixels(task)
        whole = model.encoder.vision_model(pixel_values=video).last_hidden_state
        own = model.encoder(video.unflatten(0, (-1, 2))).tokens
        for layer in model.encoder.layers:
            pass_besides(layer, some_future_name=None, a_flag=True)
        again = model.encoder.vision_model(pixel_values=video).last_hidden_state
    assert max_error(whole, own.flatten(0, 1)) == 0
    assert torch.equal(again, whole)
    for layer in model.encoder.layers:
        with pytest.raises(ValueError, match="got a_mask"):
            layer(whole, a_mask=torch.ones(1))


@pytest.mark.parametrize("task", TASKS)
def test_every_layer_is_computed_twice_where_gradients_are_checkpointed(task):
    model = video_model(task).train()
    checkpoint_layers(model)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert len(layers) == 4
    # Not the last part of a layer, within which computing again may stop.
    inner = [m.layer_norm2 if isinstance(m, VideoLayer) else m.attention for m in layers]
    calls = record(SimpleNamespace(get_submodule=lambda i: inner[i]), range(len(inner)))

    def step(model=model):
        for found in calls.values():
            found.clear()
        videos = model.encoder(pixels(task).unflatten(0, (-1, 2))).tokens.flatten(1, 2)
        # As the captioner has it: a second computation would add to a cache.
        cache = dict(use_cache=False) if task == "captioning" else {}
        return text_model(model)(IDS, encoder_hidden_states=videos, **cache)[0]

    step().sum().backward()
    assert [len(found) for found in calls.values()] == [2] * 4
    with torch.no_grad():
        step()
    assert [len(found) for found in calls.values()] == [1] * 4
    model.eval()
    step().sum().backward()
    assert [len(found) for found in calls.values()] == [1] * 4
    copied = copy.deepcopy(model)
    assert torch.equal(step(copied), step())
    torch.nn.init.ones_(copied.encoder.layers[0].mlp.fc2.bias)
    assert not torch.equal(step(copied), step())


def test_a_video_memory_is_told_by_its_type():
    layer = next(m for m in video_model("captioning").modules() if isinstance(m, CrossAttention))
    hidden = torch.randn(VIDEOS, LENGTH, 16, dtype=torch.float64)
    memory = VideoMemory(tokens("captioning"))
    wanted, _ = layer(hidden, encoder_hidden_states=memory)
    for given in (layer(hidden, None, memory), layer(hidden, key_value_states=memory)):
        assert torch.equal(given[0], wanted)


def test_a_call_that_is_not_taken_is_found(recorded):
    _, modules = recorded

    class Strict(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    module, calls = next(found for found in modules.values() if type(found[0]) is CrossAttention)
    with pytest.raises(TypeError):
        assert_answered_alike(Strict(), calls[0], TOLERANCE)
    wrong = Call(calls[0].args, calls[0].kwargs, (calls[0].output[0] + 1, None))
    with pytest.raises(AssertionError):
        assert_answered_alike(module, wrong, TOLERANCE)
