"""What each tuning method inserts and updates, where it starts, and what it can tell apart."""

import ast
import copy
import gc
import itertools
import re
import weakref
from pathlib import Path

import pytest
import torch
from caption_models import FRAMES, captions, clip, redraw, tiny_blip, tiny_captioner
from retrieval_models import texts, tiny_model
from transformers.models.blip.modeling_blip import BlipAttention

import tokenmix_ops
from tokenmix_ops import mix_tokens, unmix_tokens
from tokenmix_ops.modules import TokenMixing
from tokenmix_ops.testing import max_error
from tokenmix_ops.video.encoder import VideoEncoder
from tokenmix_ops.video.engine.checkpointing import checkpoint_layers
from tokenmix_ops.video.layer import VideoLayer
from tokenmix_ops.video.retrieval.retriever import VideoRetriever
from tokenmix_ops.video.tuning import METHODS, Tuning, apply, resolved
from tokenmix_ops.video.tuning.adapter import Adapter
from tokenmix_ops.video.tuning.dual_attention import DualAttention
from tokenmix_ops.video.tuning.lora import merged_projections, split_projection
from tokenmix_ops.video.tuning.st_adapter import STAdapter

DEPTH = 3
TOWER = "encoder.vision_model."
LAYER = re.escape(TOWER) + r"encoder\.layers\."
LP = re.escape(TOWER) + r"embeddings\."
LH = r"text_decoder\.cls\.predictions\."
NORM = re.escape(TOWER) + r"post_layernorm\."
ATTENTION = r"(layer_norm1|self_attn)\."
FFN = r"(layer_norm2|mlp)\."
PARTS = [LP, LH, NORM]

# What each method updates besides PARTS, in names of a captioner of three layers.
UPDATED = {
    "token_mixing": [f"{LAYER}2."],
    "spatial": [f"{LAYER}2."],
    "full": [""],
    "temporal": [f"{LAYER}[345]."],
    "dual_attention": [rf"{LAYER}[012].self_attn.(temporal\.|gate)"],
    "st_adapter": [rf"{LAYER}[012].before_attention."],
    "adapter": [rf"{LAYER}[012].before_(attention|ffn)."],
    "bitfit": [r".*\.bias$"],
    "lora": [rf"{LAYER}[012].self_attn.(query|value).lora_[AB]."],
    "frozen": [],
}
POSITION = {name: dict(temporal_position=True) for name in ("full", "temporal", "dual_attention")}
WITHOUT_PARTS = ("bitfit", "frozen")
# Modules that the image model does not have.
INSERTED = {
    "full": [f"vision_model.encoder.layers.{i}" for i in (3, 4, 5)],
    "temporal": [f"vision_model.encoder.layers.{i}" for i in (3, 4, 5)],
    "dual_attention": [f"vision_model.encoder.layers.{i}.self_attn" for i in range(3)],
    "st_adapter": [f"vision_model.encoder.layers.{i}.before_attention" for i in range(3)],
    "adapter": [
        f"vision_model.encoder.layers.{i}.before_{part}"
        for i in range(3)
        for part in ("attention", "ffn")
    ],
    "lora": [
        f"vision_model.encoder.layers.{i}.self_attn.{part}"
        for i in range(3)
        for part in ("key", "query", "value")
    ],
}


def tuned(method, depth=DEPTH, num_frames=FRAMES, width=24, heads=3, seed=0, **settings):
    """A captioner with a method applied, as it starts."""
    captioner = tiny_captioner(num_frames, depth=depth, width=width, heads=heads, seed=seed)
    apply(captioner, Tuning(method=method, **settings))
    return captioner


def matching(model, patterns):
    return {n for n, _ in model.named_parameters() if any(re.match(p, n) for p in patterns)}


def updated(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def tokens(captioner, pixels):
    return captioner.encoder(pixels).tokens.detach()


def trained(captioner, seed=7):
    """As if its inserted and updated parts had been trained for long: other numbers everywhere."""
    names = updated(captioner)
    moved = redraw(copy.deepcopy(captioner), seed)
    with torch.no_grad():
        for name, parameter in captioner.named_parameters():
            if name in names:
                parameter.copy_(moved.get_parameter(name))
    return captioner


def test_every_method_is_here():
    assert set(METHODS) == set(UPDATED)
    assert [method.name for method in METHODS.values()] == list(METHODS)


def test_a_method_is_one_file():
    """Code outside of that file asks the method, and never compares with a method's name."""
    for path in (Path(tokenmix_ops.__file__).parent / "video").rglob("*.py"):
        if path.stem not in METHODS:
            code = ast.parse(path.read_text("utf-8"))
            compared = {
                part.value
                for node in ast.walk(code)
                if isinstance(node, ast.Compare)
                for part in ast.walk(node)
                if isinstance(part, ast.Constant)
            }
            assert compared.isdisjoint(set(METHODS) - {"spatial", "temporal"}), path


@pytest.mark.parametrize("method", METHODS)
def test_what_is_updated_is_what_should_be_and_gets_a_gradient(method):
    captioner = tiny_captioner(depth=DEPTH)
    result = apply(captioner, Tuning(method=method))
    wanted = UPDATED[method] + ([] if method in WITHOUT_PARTS else PARTS)
    assert updated(captioner) == set(result.updated) == matching(captioner, wanted)
    assert all(matching(captioner, [pattern]) for pattern in wanted)
    assert set(result.inserted) == {f"encoder.{n}" for n in INSERTED.get(method, [])}
    assert captioner.tuning.method == method
    trained(captioner)
    loss = captioner(clip(), *captions())
    if method == "frozen":
        assert not loss.requires_grad
        return
    loss.backward()
    for name, parameter in captioner.named_parameters():
        if name in result.updated:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("width", "heads", "depth", "num_frames"), [(16, 1, 1, 1), (24, 2, 2, 3), (32, 4, 4, 5)]
)
def test_any_width_depth_and_number_of_frames(method, width, heads, depth, num_frames):
    captioner = tuned(method, depth, num_frames, width, heads)
    encoding = trained(captioner).encoder(clip(1, num_frames))
    assert encoding.tokens.shape == (1, num_frames, 10, width)
    assert encoding.tokens.isfinite().all()
    assert encoding.tokens.dtype == torch.float64


RETRIEVER_HEADS = r"(vision_proj|text_proj|itm_head)\."


@pytest.mark.parametrize("method", METHODS)
def test_a_retriever_is_tuned_like_a_captioner(method):
    retriever = VideoRetriever(tiny_model().double(), num_frames=2)
    result = apply(retriever, Tuning(method))
    # Its tower has two layers, so the last is the second; temporal blocks follow.
    number = {"2": "1", "[345]": "[23]"}
    patterns = [
        next((p.replace(a, b) for a, b in number.items() if f"layers\\.{a}" in p), p)
        for p in UPDATED[method]
    ]
    patterns += [] if method in WITHOUT_PARTS else [LP, NORM, RETRIEVER_HEADS]
    assert updated(retriever) == set(result.updated) == matching(retriever, patterns)
    assert all(matching(retriever, [pattern]) for pattern in patterns)
    pixels = torch.randn(3, 2, 3, 16, 16, dtype=torch.float64)
    encoded = trained(retriever).encode_videos(pixels)
    assert max_error(retriever.embed_videos(pixels), encoded.embedding) < 1e-11
    ids, mask = texts(3)
    logits = retriever.match(ids, mask, retriever.remember(encoded.tokens))
    loss = logits.square().sum() + encoded.embedding.sum() + retriever.embed_texts(ids, mask).sum()
    if method == "frozen":
        assert not loss.requires_grad
        return
    loss.backward()
    for name, parameter in retriever.named_parameters():
        assert (parameter.grad is not None) == (name in result.updated), name


@pytest.mark.interfaces
@pytest.mark.parametrize("method", METHODS)
def test_all_attention_runs_on_the_operator(method):
    captioner = tuned(method)
    assert not any(isinstance(m, BlipAttention) for m in captioner.modules())
    for layer in captioner.encoder.layers:
        assert type(layer) is VideoLayer
        assert isinstance(layer.self_attn, TokenMixing | DualAttention)


@pytest.mark.parametrize("method", METHODS)
def test_updating_everything_leaves_nothing_out(method):
    captioner = tuned(method, everything=True)
    assert updated(captioner) == matching(captioner, [""])
    captioner(clip(), *captions()).backward()
    without = {n for n, p in captioner.named_parameters() if p.grad is None}
    assert without == set()


@pytest.mark.parametrize(
    "method", ["spatial", "dual_attention", "st_adapter", "adapter", "bitfit", "lora", "frozen"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fresh_model_is_the_image_model(method, dtype):
    plain = tiny_captioner(depth=DEPTH, dtype=dtype)
    captioner = copy.deepcopy(plain)
    apply(captioner, Tuning(method=method))
    pixels = clip(dtype=dtype)
    given, wanted = tokens(captioner, pixels), tokens(plain, pixels)
    if method == "lora":
        # Its projections are three products in place of one.
        assert max_error(given, wanted) < (1e-4 if dtype == torch.float32 else 1e-12)
    else:
        assert torch.equal(given, wanted)
    if method not in ("spatial", "bitfit", "frozen"):
        assert not torch.equal(tokens(trained(captioner), pixels), wanted)


@pytest.mark.parametrize("method", ["token_mixing", "full", "temporal"])
def test_a_fresh_model_that_is_not_the_image_model(method):
    plain = tiny_captioner(depth=DEPTH)
    assert not torch.equal(tokens(tuned(method), clip()), tokens(plain, clip()))


@pytest.mark.parametrize("method", ["temporal", "full"])
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_temporal_blocks_start_from_the_last_spatial_layers(method, num_blocks):
    captioner = tuned(method, num_blocks=num_blocks)
    layers = captioner.encoder.layers
    assert len(layers) == DEPTH + num_blocks
    for offset in range(num_blocks):
        block, source = layers[DEPTH + offset], layers[DEPTH - num_blocks + offset]
        assert block.self_attn.mixing.kind == "temporal"
        assert source.self_attn.mixing.kind == "spatial"
        own, original = dict(block.named_parameters()), dict(source.named_parameters())
        assert own.keys() == original.keys()
        for name, parameter in own.items():
            assert torch.equal(parameter, original[name])
            assert parameter.data_ptr() != original[name].data_ptr()


@pytest.mark.parametrize(("depth", "blocks"), [(1, 1), (4, 4), (6, 4)])
def test_there_are_four_temporal_blocks_if_the_tower_has_as_many(depth, blocks):
    assert len(tuned("temporal", depth=depth).encoder.layers) == depth + blocks


def test_a_temporal_block_attends_over_the_frames_of_each_place():
    captioner = tuned("temporal", num_blocks=1)
    block = captioner.encoder.layers[-1]
    hidden = torch.randn(2 * FRAMES, 10, 24, dtype=torch.float64)
    spatial = captioner.encoder.layers[DEPTH - 1]
    # Frames in the place of tokens: the plain layer then attends over them.
    turned = hidden.unflatten(0, (2, FRAMES)).transpose(1, 2).flatten(0, 1)
    assert turned.shape == (20, FRAMES, 24)
    plain = tiny_blip(depth=DEPTH).vision_model.encoder.layers[-1]
    wanted = plain(turned).unflatten(0, (2, 10)).transpose(1, 2).flatten(0, 1)
    assert max_error(block(hidden), wanted) < 1e-12
    assert max_error(spatial(hidden), plain(hidden)) < 1e-12


def test_dual_attention_is_spatial_plus_gated_temporal_of_the_same_weights():
    captioner = tuned("dual_attention")
    attention = captioner.encoder.layers[1].self_attn
    assert isinstance(attention, DualAttention)
    assert attention.gate.item() == 0
    own, spatial = attention.temporal.state_dict(), attention.spatial.state_dict()
    assert own.keys() == spatial.keys()
    for name in own:
        assert torch.equal(own[name], spatial[name])
        assert own[name].data_ptr() != spatial[name].data_ptr()
    hidden = torch.randn(2 * FRAMES, 10, 24, dtype=torch.float64)
    with torch.no_grad():
        attention.gate.fill_(0.7)
        kept = attention.spatial(hidden)[0]
        added = attention(hidden)[0] - kept
        wanted = torch.tensor(0.7, dtype=torch.float64).tanh() * attention.temporal(hidden)[0]
    assert attention.temporal.mixing.kind == "temporal"
    assert max_error(added, wanted) < 1e-12


def test_an_st_adapter_sums_over_neighbours_in_time_and_space_and_passes_cls_on():
    frames, side, dim = 3, 4, 6
    adapter = redraw(STAdapter(dim, 2, frames).double(), scale=1.0)
    hidden = torch.randn(2 * frames, 1 + side**2, dim, dtype=torch.float64)
    given = adapter(hidden)
    assert torch.equal(given[:, 0], hidden[:, 0])
    video = hidden[:, 1:].reshape(2, frames, side, side, dim)
    inner = video @ adapter.down.weight.T + adapter.down.bias
    found = adapter.convolution.bias.expand(2, frames, side, side, 2).clone()
    for place in itertools.product(range(frames), range(side), range(side)):
        for step in itertools.product(range(3), repeat=3):
            t, y, x = (here + there - 1 for here, there in zip(place, step, strict=True))
            if 0 <= t < frames and 0 <= y < side and 0 <= x < side:
                weight = adapter.convolution.weight[(slice(None), slice(None), *step)]
                found[(slice(None), *place)] += inner[:, t, y, x] @ weight.T
    wanted = video + found @ adapter.up.weight.T + adapter.up.bias
    assert max_error(given[:, 1:], wanted.reshape(2 * frames, side**2, dim)) < 1e-12


def test_an_adapter_is_three_layers_with_one_sigmoid_and_a_residual():
    adapter = redraw(Adapter(6, 2).double(), scale=1.0)
    hidden = torch.randn(5, 6, dtype=torch.float64)
    low = 1 / (1 + (-(hidden @ adapter.down.weight.T + adapter.down.bias)).exp())
    inner = low @ adapter.middle.weight.T + adapter.middle.bias
    wanted = hidden + inner @ adapter.up.weight.T + adapter.up.bias
    assert max_error(adapter(hidden), wanted) < 1e-12


@pytest.mark.parametrize("method", ["token_mixing", "spatial"])
@pytest.mark.parametrize(
    ("switches", "patterns"),
    [
        # The rows of Table 4, in its order.
        (dict(linear_projection=False, language_head=False), [f"{LAYER}2.", NORM]),
        (dict(language_head=False), [f"{LAYER}2.", NORM, LP]),
        (dict(linear_projection=False), [f"{LAYER}2.", NORM, LH]),
        (dict(attention=False, ffn=False), [NORM, LP, LH]),
        (dict(ffn=False), [f"{LAYER}2.{ATTENTION}", *PARTS]),
        (dict(attention=False), [f"{LAYER}2.{FFN}", *PARTS]),
        ({}, [f"{LAYER}2.", *PARTS]),
    ],
    ids=str,
)
def test_the_switches_of_table_4(method, switches, patterns):
    captioner = tuned(method, **switches)
    assert updated(captioner) == matching(captioner, patterns)
    kinds = [layer.self_attn.mixing.kind for layer in captioner.encoder.layers]
    mixing = "released" if method == "token_mixing" else "spatial"
    assert kinds == ["spatial", "spatial", mixing]


@pytest.mark.parametrize(
    ("method", "switches", "patterns"),
    [
        ("temporal", dict(ffn=False), [rf"{LAYER}[345].{ATTENTION}"]),
        ("temporal", dict(attention=False), [rf"{LAYER}[345].{FFN}"]),
        ("full", dict(everything=False), [rf"{LAYER}[345]."]),
        ("full", dict(everything=False, attention=False), [rf"{LAYER}[345].{FFN}"]),
        (
            "dual_attention",
            dict(ffn=True),
            [rf"{LAYER}[012].(self_attn.(temporal\.|gate)|{FFN})"],
        ),
        ("dual_attention", dict(attention=False, ffn=True), [rf"{LAYER}[012].{FFN}"]),
        ("adapter", dict(ffn=False), [rf"{LAYER}[012].before_attention."]),
        ("adapter", dict(attention=False), [rf"{LAYER}[012].before_ffn."]),
        ("adapter", dict(attention=False, ffn=False), []),
        ("st_adapter", dict(attention=False), []),
        ("st_adapter", dict(ffn=False), [rf"{LAYER}[012].before_attention."]),
        ("lora", dict(ffn=True), [rf"{LAYER}[012].(self_attn|mlp).(query|value|fc1|fc2).lora_"]),
        ("lora", dict(attention=False, ffn=True), [rf"{LAYER}[012].mlp.(fc1|fc2).lora_"]),
        ("lora", dict(attention=False), []),
    ],
    ids=str,
)
def test_the_switches_of_the_other_methods(method, switches, patterns):
    captioner = tuned(method, **switches)
    assert updated(captioner) == matching(captioner, patterns + PARTS)
    assert not [p for p in patterns if not matching(captioner, [p])]
    for part, off in ((LP, "linear_projection"), (LH, "language_head")):
        captioner = tuned(method, **{off: False}, **switches)
        wanted = patterns + [other for other in PARTS if other != part]
        assert updated(captioner) == matching(captioner, wanted)


def test_parts_can_be_switched_on_where_the_method_leaves_them_out():
    for part, switch in ((LP, "linear_projection"), (LH, "language_head")):
        frozen = tuned("frozen", **{switch: True})
        assert updated(frozen) == matching(frozen, [part, NORM])
        bitfit = tuned("bitfit", **{switch: True})
        assert updated(bitfit) == matching(bitfit, [part, r".*\.bias$"])


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [(None, {2}), ((0,), {0}), ((-1,), {2}), ((2, 0), {0, 2}), ((-3, 0, -2), {0, 1}), ((), set())],
)
def test_any_set_of_layers_mixes_and_is_updated(layers, chosen):
    captioner = tuned("token_mixing", layers=layers, mixing="paper")
    kinds = [layer.self_attn.mixing.kind for layer in captioner.encoder.layers]
    assert kinds == ["paper" if index in chosen else "spatial" for index in range(DEPTH)]
    assert updated(captioner) == matching(captioner, [f"{LAYER}{i}." for i in chosen] + PARTS)


@pytest.mark.parametrize("method", ["spatial", "dual_attention", "st_adapter", "adapter", "lora"])
def test_the_other_methods_take_any_set_of_layers_too(method):
    captioner = tuned(method, layers=(-1, 0))
    everywhere = matching(captioner, [p for p in UPDATED[method] if method != "spatial"])
    assert updated(captioner) == matching(captioner, PARTS) | (
        matching(captioner, [f"{LAYER}[02]."]) if method == "spatial" else everywhere
    )
    found = {int(n.split(".")[4]) for n in updated(captioner) if ".layers." in n}
    assert found == {0, 2}


@pytest.mark.parametrize("mixing", ["paper", "joint", "adjacent", "temporal"])
def test_the_mixing_is_as_asked_for(mixing):
    captioner = tuned("token_mixing", mixing=mixing)
    wanted = VideoEncoder(
        tiny_blip(depth=DEPTH).vision_model, num_frames=FRAMES, mixing=mixing, mixing_layers=(-1,)
    )
    assert torch.equal(tokens(captioner, clip()), wanted(clip()).tokens)


# What the order of frames changes. Rows of tokens are moved as the frames are where it does not.
BLIND = [
    ("frozen", {}),
    ("spatial", {}),
    ("adapter", {}),
    ("bitfit", {}),
    ("lora", {}),
    ("full", {}),
    ("temporal", {}),
    ("dual_attention", {}),
    ("dual_attention", dict(ffn=True)),
    ("token_mixing", dict(mixing="joint")),
    ("token_mixing", dict(mixing="temporal")),
]
SEEING = [
    ("full", dict(temporal_position=True)),
    ("temporal", dict(temporal_position=True)),
    ("dual_attention", dict(temporal_position=True)),
    ("dual_attention", dict(temporal_position=True, layers=(1, 2))),
    ("st_adapter", {}),
    ("token_mixing", {}),
    ("token_mixing", dict(mixing="paper")),
    ("token_mixing", dict(mixing="adjacent")),
]
ORDERS = [[3, 2, 1, 0], [1, 0, 2, 3], [2, 3, 1, 0]]


@pytest.mark.parametrize(("method", "settings"), BLIND, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_these_cannot_tell_the_order_of_frames(method, settings, order):
    captioner = trained(tuned(method, **settings))
    encoding, moved = captioner.encoder(clip()), captioner.encoder(clip()[:, order])
    assert max_error(moved.tokens, encoding.tokens[:, order]) < 1e-11
    assert max_error(moved.pooled, encoding.pooled) < 1e-11


@pytest.mark.parametrize(("method", "settings"), SEEING, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_these_can_tell_the_order_of_frames(method, settings, order):
    captioner = trained(tuned(method, **settings))
    encoding, moved = captioner.encoder(clip()), captioner.encoder(clip()[:, order])
    assert max_error(moved.pooled, encoding.pooled) > 1e-3
    assert max_error(moved.tokens, encoding.tokens[:, order]) > 1e-3


@pytest.mark.parametrize("method", ["full", "temporal", "dual_attention"])
def test_a_temporal_position_starts_at_zero_and_is_updated(method):
    without = tuned(method)
    captioner = tuned(method, temporal_position=True)
    assert torch.equal(tokens(captioner, clip()), tokens(without, clip()))
    positions = {n for n, _ in captioner.named_parameters() if n.endswith("position")}
    assert len(positions) == 1
    assert positions <= updated(captioner)
    assert updated(captioner) - positions == updated(without)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_prefix_alone_is_that_of_the_full_pass(method, batch):
    captioner = trained(tuned(method, **POSITION.get(method, {})))
    full = captioner.encoder(clip(batch))
    prefix = captioner.encoder(clip(batch), queries="prefix")
    assert prefix.tokens.shape == (batch, FRAMES, 1, 24)
    assert max_error(prefix.tokens, full.tokens[:, :, :1]) < 1e-11
    assert max_error(prefix.pooled, full.pooled) < 1e-11


@pytest.mark.parametrize("method", METHODS)
def test_videos_of_a_batch_do_not_see_each_other(method):
    captioner = trained(tuned(method, **POSITION.get(method, {})))
    pixels = clip(3)
    pixels[1] = torch.nan
    output = tokens(captioner, pixels)
    assert output[1].isnan().any()
    assert max_error(output[[0, 2]], tokens(captioner, clip(3))[[0, 2]]) < 1e-11


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_frames", [1, 3, 6])
def test_the_number_of_frames_can_change_after_the_method_was_applied(method, num_frames):
    captioner = trained(tuned(method))
    anew = tuned(method, num_frames=num_frames)
    anew.load_state_dict(captioner.state_dict())
    captioner.encoder.set_num_frames(num_frames)
    assert captioner.encoder.num_frames == num_frames
    pixels = clip(num_frames=num_frames)
    assert torch.equal(tokens(captioner, pixels), tokens(anew, pixels))


@pytest.mark.parametrize("method", ["full", "temporal", "dual_attention"])
@pytest.mark.parametrize("num_frames", [2, 8])
def test_temporal_positions_are_of_as_many_frames(method, num_frames):
    captioner = tuned(method, temporal_position=True)
    captioner.encoder.set_num_frames(num_frames)
    with pytest.raises(ValueError, match=f"has 4 frames, but the encoder is set to {num_frames}:"):
        captioner.encoder(clip(4, num_frames))
    captioner.encoder.set_num_frames(FRAMES)
    assert captioner.encoder(clip()).tokens.isfinite().all()


class Kept:
    """What of a tower's layers outlives the forward pass, and what autograd saves in them."""

    def __init__(self, layers):
        self.outputs = []
        self.saved = []
        self.inside = None
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, index=index: setattr(self, "inside", index))
            layer.register_forward_hook(lambda _, __, output: self._left(output))

    def _left(self, output):
        self.inside = None
        self.outputs.append(weakref.ref(output))

    def pack(self, tensor):
        if self.inside is not None and not isinstance(tensor, torch.nn.Parameter):
            self.saved.append(self.inside)
        return tensor

    def alive(self):
        gc.collect()
        return [index for index, output in enumerate(self.outputs) if output() is not None]


@pytest.fixture
def small_heap():
    """Garbage is looked for among what a test makes, not among all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def passed(captioner, checkpointed):
    """The loss of a forward pass and what the tower keeps of it."""
    captioner.train()
    if checkpointed:
        checkpoint_layers(captioner.encoder)
    kept = Kept(captioner.encoder.layers)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        loss = captioner(clip(), *captions())
    return loss, kept


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("method", "settings", "first"),
    [
        ("token_mixing", {}, 2),
        ("token_mixing", dict(layers=(1,)), 1),
        ("spatial", dict(ffn=False), 2),
        ("temporal", dict(num_blocks=1), 3),
        ("adapter", dict(layers=(2,)), 2),
        ("st_adapter", dict(layers=(2,)), 2),
        ("lora", dict(layers=(2,)), 2),
        ("dual_attention", dict(layers=(1, 2)), 1),
    ],
    ids=str,
)
@pytest.mark.usefixtures("small_heap")
def test_below_the_first_tuned_layer_nothing_is_kept(method, settings, first, checkpointed):
    captioner = trained(tuned(method, linear_projection=False, **settings))
    loss, kept = passed(captioner, checkpointed)
    if not checkpointed:
        assert set(kept.saved) == set(range(first, len(kept.outputs)))
    # The last frozen layer's output is the first tuned one's input.
    assert not [index for index in kept.alive() if index < first - 1]
    loss.backward()
    assert captioner.encoder.vision_model.post_layernorm.weight.grad is not None


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.usefixtures("small_heap")
def test_with_the_linear_projection_updated_every_layer_is_kept(checkpointed):
    _loss, kept = passed(tuned("token_mixing"), checkpointed)
    if not checkpointed:
        assert set(kept.saved) == set(range(DEPTH))
    assert kept.alive()[: DEPTH - 1] == list(range(DEPTH - 1))


@pytest.mark.interfaces
@pytest.mark.parametrize("settings", [{}, dict(ffn=True), dict(layers=(1,)), dict(attention=False)])
def test_merged_lora_is_a_plain_tower_with_the_same_outputs(settings):
    captioner = trained(tuned("lora", rank=3, **settings))
    merged = merged_projections(captioner.encoder)
    plain = tiny_blip(depth=DEPTH, seed=5).vision_model
    plain.load_state_dict(merged)
    output = plain(clip().flatten(0, 1)).last_hidden_state.unflatten(0, (-1, FRAMES))
    assert max_error(output, tokens(captioner, clip())) < 1e-11
    before = tiny_blip(depth=DEPTH).vision_model.state_dict()
    touched = {n for n, w in merged.items() if not torch.equal(w, before[n])}
    touched = {n for n in touched if "layers." in n}
    chosen = settings.get("layers", (0, 1, 2))
    kinds = ["self_attn.qkv"] if settings.get("attention", True) else []
    kinds += ["mlp.fc1", "mlp.fc2"] if settings.get("ffn") else []
    assert touched == {f"encoder.layers.{i}.{kind}.weight" for i in chosen for kind in kinds}
    # Merging takes copies: the model goes on as it was.
    assert max_error(tokens(captioner, clip()), output) < 1e-11


@pytest.mark.interfaces
def test_a_layer_that_was_split_for_lora_keeps_no_packed_copy_and_is_not_put_back():
    captioner = tiny_captioner(depth=DEPTH)
    layers = captioner.encoder.layers
    packed = weakref.ref(layers[0].self_attn.qkv.weight)
    apply(captioner, Tuning("lora", layers=(0,)))
    gc.collect()
    assert packed() is None
    attention = [layer.self_attn for layer in layers]
    for change in (unmix_tokens, mix_tokens):
        with pytest.raises(ValueError, match="BlipAttention cannot be restored: its 'qkv' was"):
            change(
                captioner.encoder.vision_model,
                **({"layers": "all"} if change is mix_tokens else {}),
            )
        assert [layer.self_attn for layer in layers] == attention
    assert tokens(captioner, clip()).isfinite().all()


@pytest.mark.interfaces
def test_lora_leaves_the_keys_alone():
    captioner = trained(tuned("lora", layers=(0,)))
    width = 24
    merged = merged_projections(captioner.encoder)["encoder.layers.0.self_attn.qkv.weight"]
    before = tiny_blip(depth=DEPTH).vision_model.encoder.layers[0].self_attn.qkv.weight
    changed = (merged != before).flatten(1).any(dim=1)
    assert changed.tolist() == [True] * width + [False] * width + [True] * width


@pytest.mark.interfaces
def test_lora_is_of_the_rank_asked_for():
    captioner = tuned("lora", rank=5)
    query = captioner.encoder.layers[0].self_attn.query
    assert query.lora_A["default"].weight.shape == (5, 24)
    assert query.scaling["default"] == 2


def test_stochastic_depth_skips_branches_of_frames_in_training_only():
    layer = tiny_captioner().encoder.layers[0]
    hidden = torch.randn(400 * FRAMES, 10, 24, dtype=torch.float64)
    hidden[:] = hidden[0]
    still = layer(hidden)
    layer.drop_path = 0.25
    assert torch.equal(layer(hidden), still)
    layer.train()
    torch.manual_seed(0)
    with torch.no_grad():
        attended, _ = layer.self_attn(layer.layer_norm1(hidden))
        dropped = layer(hidden)
    # A frame has each of its two branches, scaled up, or not.
    first = hidden[0] + torch.tensor([0, 1 / 0.75], dtype=torch.float64).view(2, 1, 1) * attended[0]
    second = layer.mlp(layer.layer_norm2(first)) / 0.75
    outcomes = torch.stack([first[0], first[1], first[0] + second[0], first[1] + second[1]])
    which = (dropped[:, None] - outcomes).abs().amax(dim=(2, 3))
    assert (which.min(dim=1).values < 1e-11).all()
    shares = which.argmin(dim=1).bincount(minlength=4) / len(hidden)
    wanted = torch.tensor([0.25 * 0.25, 0.75 * 0.25, 0.25 * 0.75, 0.75 * 0.75])
    assert (shares - wanted).abs().max() < 4 * (0.25 / len(hidden)) ** 0.5
    # In expectation a branch is what it is without.
    mean = torch.stack([layer._dropped(attended).mean(dim=0) for _ in range(20)])
    assert max_error(mean.mean(dim=0), attended[0]) < 0.02 * attended[0].abs().max()


def test_stochastic_depth_is_copied_to_temporal_blocks():
    captioner = tiny_captioner(depth=DEPTH)
    for index, layer in enumerate(captioner.encoder.layers):
        layer.drop_path = index / 10
    apply(captioner, Tuning("temporal", num_blocks=2))
    assert [layer.drop_path for layer in captioner.encoder.layers] == [0, 0.1, 0.2, 0.1, 0.2]


def test_inserted_parts_follow_the_tower():
    with torch.device("meta"):
        captioner = tiny_captioner(depth=DEPTH)
    for method in METHODS:
        model = copy.deepcopy(captioner)
        apply(model, Tuning(method, **POSITION.get(method, {})))
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}


def test_resolved_settings_do_the_same_and_leave_no_switch_open():
    for method in METHODS:
        tuning = Tuning(method)
        complete = resolved(tuning)
        assert None not in (complete.everything, complete.linear_projection, complete.ffn)
        assert resolved(complete) == complete
        models = tiny_captioner(depth=DEPTH), tiny_captioner(depth=DEPTH)
        assert apply(models[0], tuning) == apply(models[1], complete)


def test_a_method_is_applied_once_and_to_a_model_without_mixing(assert_says):
    for method in METHODS:
        captioner = tuned(method)
        assert_says(
            lambda captioner=captioner: apply(captioner, Tuning()),
            f"the model was tuned by {method} already: load it again",
        )
    mixing = tiny_captioner()
    mix_tokens(mixing.encoder.vision_model, FRAMES, layers=(1,))
    assert_says(
        lambda: apply(mixing, Tuning("spatial")),
        "layer 1 mixes tokens already: load the image model again",
    )


@pytest.mark.parametrize(
    ("tuning", "text"),
    [
        (Tuning("prompt"), f"method must be one of {', '.join(UPDATED)}, got 'prompt'"),
        (Tuning(layers=(3,)), "layer 3 does not exist: the tower has 3 layers"),
        (Tuning("adapter", layers=(0, -4)), "layer -4 does not exist: the tower has 3 layers"),
        (Tuning("temporal", num_blocks=4), "num_blocks = 4 must be 1 to 3, the depth"),
        (Tuning("full", num_blocks=0), "num_blocks = 0 must be 1 to 3, the depth"),
        (Tuning("lora", rank=0), "rank must be at least 1, got 0"),
        (Tuning("adapter", layers=(0,), bottleneck=0), "bottleneck must be at least 1, got 0"),
        (Tuning("st_adapter", bottleneck=-1), "bottleneck must be at least 1, got -1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_leaves_the_model_as_it_was(tuning, text, assert_says):
    captioner = tiny_captioner(depth=DEPTH)
    names = list(captioner.state_dict())
    assert_says(lambda: apply(captioner, tuning), text)
    assert list(captioner.state_dict()) == names
    assert captioner.tuning is None
    apply(captioner, Tuning())


# What each method reads; it refuses the others.
SETTINGS = dict(
    layers=(0,), mixing="paper", bottleneck=5, rank=2, num_blocks=1, temporal_position=True
)
READ = {
    "token_mixing": {"layers", "mixing"},
    "spatial": {"layers"},
    "full": {"num_blocks", "temporal_position"},
    "temporal": {"num_blocks", "temporal_position"},
    "dual_attention": {"layers", "temporal_position"},
    "st_adapter": {"layers", "bottleneck"},
    "adapter": {"layers", "bottleneck"},
    "bitfit": set(),
    "lora": {"layers", "rank"},
    "frozen": set(),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_changes_the_model_or_is_refused(method, setting, assert_says):
    value = SETTINGS[setting]
    captioner = tiny_captioner(depth=DEPTH)
    tuning = Tuning(method, **{setting: value})
    if setting in READ[method]:
        apply(captioner, tuning)
        assert repr(captioner) != repr(tuned(method)) or updated(captioner) != updated(
            tuned(method)
        )
    else:
        assert_says(
            lambda: apply(captioner, tuning),
            f"method {method!r} has no use for {setting} = {value!r}: leave it out",
        )


def test_only_this_packages_attention_is_split(assert_says):
    attention = tiny_blip().vision_model.encoder.layers[0].self_attn
    assert_says(
        lambda: split_projection(attention),
        "BlipAttention is not an attention layer of this package",
    )
