"""Modules of this package inside transformers' models: how they are called, now and one day."""

import copy
import io
import pickle
from types import SimpleNamespace

import caption_models
import numpy as np
import pytest
import retrieval_models
import torch
from recorded_calls import Call, assert_answered_alike, pass_besides, record
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from bench.published import as_published
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


def hidden_states_of(call):
    return call.args[0] if call.args else call.kwargs["hidden_states"]


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
        more |= dict(a_flag=True, a_number=3, is_causal=0, a_mask=None, some=[(1, None), {}])
        if isinstance(module, CrossAttention):
            # Without values: whoever looked at one would wait for the GPU.
            places = torch.arange(3, device="meta")
            more |= dict(cache_position=places, position_ids=places)
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
    deep = {"a": [(None, torch.ones(10))]}
    for module, calls in modules.values():
        call = calls[0]
        known = {n: v for n, v in call.kwargs.items() if n != "attention_mask"}
        for name, value in {
            "attention_mask": hides,
            "encoder_attention_mask": torch.where(hides, 0.0, -1e9),
            "some_future_mask": hides.long(),
            "mask_that_hides_nothing": torch.ones(1, 10, dtype=torch.bool, device="meta"),
            "mask_of_zeros": torch.zeros(1, 1, 1, 10),
            "block_mask": create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 128, 128, "cpu"),
            "numpy_mask": hides.numpy(),
            "list_mask": hides.tolist(),
            "head_mask": [1.0, 0.0],
            "mask_of_tokens": hidden_states_of(call),
            "some_array": np.ones(10),
            "some_arrays": [{"a": np.ones(10)}],
            "some_future_name": deep,
            "position_embeddings": (torch.ones(10), torch.ones(10)),
            "other_states": tokens("retrieval"),
            "is_causal": True,
        }.items():
            with pytest.raises(
                ValueError, match=f"no attention mask and no other keys, got {name}$"
            ):
                module(*call.args, **known, **{name: value})
        with pytest.raises(ValueError, match="got is_causal"):
            module(*call.args, **known, is_causal=1)
        for value in (hides, hides.numpy(), [deep]):
            with pytest.raises(ValueError, match="got a second tensor"):
                module(hidden_states_of(call), value, **known)


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
        return text_model(model)(IDS, encoder_hidden_states=videos)[0]

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
    copied.train()
    step(copied).sum().backward()
    assert [len(found) for found in calls.values()] == [2] * 4


class Keeping(GradientCheckpointingLayer):
    """A layer that notes what it is called with."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.seen = []

    def forward(self, hidden_states, *args, **kwargs):
        self.seen.append((args, kwargs))
        return hidden_states * self.weight


def test_a_second_time_changes_nothing():
    layer = Keeping()
    checkpoint_layers(layer)
    forward = layer.forward
    checkpoint_layers(layer)
    assert layer.forward is forward
    model = torch.nn.Sequential(layer, Keeping())
    checkpoint_layers(model)
    assert layer.forward is forward
    model(torch.ones(3)).sum().backward()
    assert [len(part.seen) for part in model] == [2, 2]


@pytest.mark.parametrize("cache", [DynamicCache(), EncoderDecoderCache(*[DynamicCache()] * 2)])
def test_a_layer_that_is_computed_twice_gets_no_cache(cache):
    layer = Keeping()
    checkpoint_layers(layer)

    def call():
        layer.seen.clear()
        return layer(torch.ones(3), cache, 2, use_cache=True, some_future_cache=cache, more=3)

    call().sum().backward()
    none = (None, 2), dict(use_cache=False, some_future_cache=None, more=3)
    assert layer.seen == [none] * 2
    kept = (cache, 2), dict(use_cache=True, some_future_cache=cache, more=3)
    with torch.no_grad():
        call()
    assert layer.seen == [kept]
    layer.eval()
    call().sum().backward()
    assert layer.seen == [kept]


def test_a_text_decoder_asked_for_a_cache_has_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        text = text_model(video_model("captioning")).train()
        if checkpointed:
            checkpoint_layers(text)
        output = text(IDS, encoder_hidden_states=tokens("captioning"), use_cache=True)
        output.logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in text.named_parameters()})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        assert max_error(checkpointed[name], gradient) < TOLERANCE, name


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS_TO_COPY = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "file": through_file,
}


@pytest.mark.parametrize("way", WAYS_TO_COPY)
def test_copies_of_checkpointed_layers_stand_alone(way):
    model = torch.nn.Sequential(Keeping(), Keeping()).train()
    checkpoint_layers(model)
    copied = WAYS_TO_COPY[way](model)
    checkpoint_layers(copied)
    model.eval()
    torch.nn.init.zeros_(copied[1].weight)
    copied(torch.ones(3)).sum().backward()
    assert [len(part.seen) for part in (*model, *copied)] == [0, 0, 2, 2]
    assert copied[1].weight.grad.tolist() == [1, 1, 1]
    assert model[1].weight.grad is None
    assert model(torch.ones(3)).tolist() == [1, 1, 1]
    shallow = copy.copy(model[0])
    assert shallow(torch.ones(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("task", TASKS)
def test_checkpointed_layers_compile_to_one_graph(task):
    model = video_model(task).train()
    checkpoint_layers(model)
    layer = model.encoder.layers[0]
    hidden = tokens("captioning" if task == "captioning" else "retrieval").requires_grad_()
    wanted = torch.autograd.grad(layer(hidden).square().sum(), hidden)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    given = torch.autograd.grad(compiled(hidden).square().sum(), hidden)
    assert max_error(given[0], wanted[0]) < TOLERANCE


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
