"""The attention module against projection plus oracle, and how it behaves as a module."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import tokenmix_ops as tm
from tokenmix_ops.reference import token_mix_attention_ref
from tokenmix_ops.testing import MIXINGS, max_error
from tokenmix_ops.tolerance import rms_error, rms_limit

BATCH, FRAMES, TOKENS, DIM, HEADS = 2, 4, 10, 12, 3
BIASES = {"both": {}, "none": dict(qkv_bias=False, proj_bias=False), "proj": dict(qkv_bias=False)}


def redraw(module, seed=0):
    """All parameters standard normal, scaled so that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / DIM**0.5)
    return module


def layer(mixing="released", dtype=torch.float64, **arguments):
    return redraw(tm.TokenMixAttention(DIM, HEADS, FRAMES, mixing, dtype=dtype, **arguments))


def video(*shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (BATCH, FRAMES, TOKENS, DIM)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def by_definition(attention, tokens):
    """Every token projected by calling ``qkv``, then the oracle, then ``proj``."""
    num_frames, num_tokens = tokens.shape[1:3]
    plan = attention.mixing.plan(num_frames, num_tokens, attention.num_prefix_tokens)
    query, key, value = (
        part.unflatten(-1, (attention.num_heads, -1))
        for part in attention.qkv(tokens).chunk(3, dim=-1)
    )
    return attention.proj(token_mix_attention_ref(query, key, value, plan).flatten(-2))


def output_and_gradients(module, tokens, forward=None):
    """Output, and gradients of the tokens and of every parameter, by name."""
    module.zero_grad()
    tokens = tokens.detach().requires_grad_()
    output = (forward or type(module).forward)(module, tokens)
    weight = video(*output.shape, seed=2).to(output.dtype)
    (output * weight).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "tokens": tokens.grad, **gradients}


def assert_same(actual, expected, limit=1e-12):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        assert max_error(value, expected[name]) <= limit, name


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_output_and_gradients_are_those_of_projection_and_oracle(mixing, biases):
    attention = layer(mixing, **BIASES[biases])
    expected = output_and_gradients(attention, video(), by_definition)
    assert_same(output_and_gradients(attention, video()), expected)


@pytest.mark.parametrize("num_prefix_tokens", [0, 3])
@pytest.mark.parametrize("mixing", ["released", "paper", "adjacent"])
def test_other_numbers_of_prefix_tokens(mixing, num_prefix_tokens):
    attention = layer(mixing, num_prefix_tokens=num_prefix_tokens)
    expected = output_and_gradients(attention, video(), by_definition)
    assert_same(output_and_gradients(attention, video()), expected)


@pytest.mark.parametrize("queries", ["all", "prefix"])
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_frames_may_be_folded_into_the_batch(mixing, queries):
    attention = layer(mixing, queries=queries)
    tokens = video()
    folded, unfolded = attention(tokens.flatten(0, 1)), attention(tokens)
    rows = TOKENS if queries == "all" else 1
    assert folded.shape == (BATCH * FRAMES, rows, DIM)
    assert unfolded.shape == (BATCH, FRAMES, rows, DIM)
    assert torch.equal(folded.view_as(unfolded), unfolded)


@pytest.mark.parametrize("num_prefix_tokens", [1, 3])
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_prefix_queries_give_the_rows_of_the_prefix_tokens(mixing, num_prefix_tokens):
    everything = layer(mixing, num_prefix_tokens=num_prefix_tokens)
    prefix = layer(mixing, num_prefix_tokens=num_prefix_tokens, queries="prefix")

    def prefix_rows(module, tokens):
        return module(tokens)[:, :, :num_prefix_tokens]

    expected = output_and_gradients(everything, video(), prefix_rows)
    assert_same(output_and_gradients(prefix, video()), expected)


PROJECTED_QUERIES = {"all": BATCH * FRAMES * TOKENS, "prefix": BATCH * FRAMES}
PROJECTED_KEYS = {
    "released": BATCH * (FRAMES + TOKENS - 1),
    "paper": BATCH * TOKENS,
    "spatial": BATCH * FRAMES * TOKENS,
    "adjacent": BATCH * FRAMES * TOKENS,
    "temporal": BATCH * FRAMES * TOKENS,
    "joint": BATCH * FRAMES * TOKENS,
}


class ProjectionFlops(TorchDispatchMode):
    """Counts what linear layers compute. FlopCounterMode itself would hook every module."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.count += flop_registry[function._overloadpacket](*args, out_val=output)
        return output


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("queries", PROJECTED_QUERIES)
@pytest.mark.parametrize("mixing", PROJECTED_KEYS)
def test_only_tokens_in_use_are_projected(mixing, queries, bias):
    arguments = dict(qkv_bias=bias, proj_bias=bias, queries=queries)
    attention = layer(mixing, torch.float32, **arguments)
    rows = 2 * PROJECTED_QUERIES[queries] + 2 * PROJECTED_KEYS[mixing]
    forward = 2 * DIM * DIM * rows
    tokens = video(dtype=torch.float32).requires_grad_()
    with ProjectionFlops() as flops:
        output = attention(tokens)
    assert flops.count == forward
    with flops:
        output.sum().backward()
    assert flops.count == 3 * forward


class Lora(nn.Module):
    """A projection with a low-rank update, as adapters of models wrap it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    """A subclass whose weight is not what it multiplies by."""

    def forward(self, x):
        return 2 * super().forward(x)


def with_lora(attention):
    attention.qkv = Lora(attention.qkv)


def with_subclass(attention):
    doubled = Doubled(DIM, 3 * DIM, dtype=torch.float64)
    doubled.load_state_dict(attention.qkv.state_dict())
    attention.qkv = doubled


def with_forward_hook(attention):
    attention.qkv.register_forward_hook(lambda module, inputs, output: 2 * output)


def with_forward_pre_hook(attention):
    attention.qkv.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def with_own_forward(attention):
    original = attention.qkv.forward
    attention.qkv.forward = lambda x: original(x) + x.sum(-1, keepdim=True)


def with_weight_norm(attention):
    weight_norm(attention.qkv)
    attention.qkv.parametrizations.weight.original0.data.mul_(1.5)


def with_backward_hook(attention):
    attention.qkv.register_full_backward_hook(lambda module, grad_in, grad_out: (3 * grad_in[0],))


WRAPPERS = (
    with_lora,
    with_subclass,
    with_forward_hook,
    with_forward_pre_hook,
    with_own_forward,
    with_weight_norm,
    with_backward_hook,
)


@pytest.mark.interfaces
@pytest.mark.parametrize("queries", ["all", "prefix"])
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("mixing", ["released", "spatial"])
def test_a_wrapped_projection_is_called(mixing, wrap, queries):
    plain, attention = layer(mixing, queries=queries), layer(mixing, queries=queries)
    wrap(attention)
    rows = TOKENS if queries == "all" else 1
    if wrap is with_lora:
        redraw(attention)

    def definition(module, tokens):
        return by_definition(module, tokens)[:, :, :rows]

    results = output_and_gradients(attention, video())
    assert_same(results, output_and_gradients(attention, video(), definition))
    unwrapped = output_and_gradients(plain, video())
    changed = "tokens" if wrap is with_backward_hook else "output"
    assert max_error(results[changed], unwrapped[changed]) > 1e-3


@pytest.mark.interfaces
def test_hooks_on_all_modules_see_the_projection():
    attention, seen = layer(), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(module)
    )
    try:
        attention(video())
    finally:
        handle.remove()
    assert attention.qkv in seen


@pytest.mark.interfaces
@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.skipif(
    torch.backends.quantized.engine == "none", reason="this PyTorch has no quantised kernels"
)
@pytest.mark.parametrize("queries", ["all", "prefix"])
def test_a_quantised_projection_is_called(queries):
    attention = layer(dtype=torch.float32, queries=queries)
    quantised = torch.ao.quantization.quantize_dynamic(attention, {"qkv"}, dtype=torch.qint8)
    assert not isinstance(quantised.qkv, nn.Linear)
    tokens = video(dtype=torch.float32)
    rows = TOKENS if queries == "all" else 1
    output = quantised(tokens)
    assert max_error(output, by_definition(quantised, tokens)[:, :, :rows]) < 1e-5
    assert 1e-3 < max_error(output, attention(tokens)) < 0.3


@pytest.mark.parametrize("queries", ["all", "prefix"])
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_attention_weights(mixing, queries):
    attention = layer(mixing, queries=queries)
    output, weights = attention(video(), need_weights=True)
    keys = mixing.plan(FRAMES, TOKENS).num_keys
    assert weights.shape == (BATCH, FRAMES, HEADS, TOKENS if queries == "all" else 1, keys)
    assert max_error(weights.sum(-1), torch.ones_like(weights[..., 0])) < 1e-14
    assert torch.equal(output, attention(video()))


def test_attention_weights_and_projected_values_make_the_output():
    attention, tokens = layer(), video()
    output, weights = attention(tokens.flatten(0, 1), need_weights=True)
    index = tm.Mixing.released().plan(FRAMES, TOKENS).key_index[0].long()
    values = attention.qkv(tokens)[..., 2 * DIM :].flatten(1, 2)[:, index]
    mixed = torch.einsum("bthsm,bmhd->btshd", weights, values.unflatten(-1, (HEADS, -1)))
    assert max_error(output, attention.proj(mixed.flatten(-2)).flatten(0, 1)) < 1e-13


def test_one_frame_of_the_released_mixing_is_plain_attention():
    attention = tm.TokenMixAttention(DIM, HEADS, num_frames=1, dtype=torch.float64)
    plain = nn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=torch.float64)
    plain.in_proj_weight.data, plain.in_proj_bias.data = attention.qkv.weight, attention.qkv.bias
    plain.out_proj.load_state_dict(attention.proj.state_dict())
    tokens = video(3, TOKENS, DIM)
    assert max_error(attention(tokens), plain(tokens, tokens, tokens)[0]) < 1e-14


def test_the_number_of_frames_can_change():
    attention, other = layer(), redraw(tm.TokenMixAttention(DIM, HEADS, 5, dtype=torch.float64))
    tokens = video(10, TOKENS, DIM)
    assert tm.set_num_frames(nn.ModuleDict({"attention": attention}), 5)["attention"] is attention
    assert torch.equal(attention(tokens), other(tokens))
    assert "num_frames=5" in repr(attention)


def test_repr_shows_the_mixing():
    shown = "num_heads=3, num_frames=4, mixing=Mixing.paper(), num_prefix_tokens=1"
    assert layer("paper").extra_repr() == shown


def test_torch_compile_makes_one_graph():
    attention = layer(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")

    def forward(module, tokens):
        return compiled(tokens)

    for batch in (2, 3):
        tokens = video(batch * FRAMES, TOKENS, DIM, dtype=torch.float32)
        graph = output_and_gradients(attention, tokens, forward)
        assert_same(graph, output_and_gradients(attention, tokens), limit=1e-4)


@pytest.mark.parametrize("mixing", ["released", "adjacent"])
def test_autocast(mixing):
    attention = layer(mixing, torch.float32)
    tokens = video(dtype=torch.float32)
    exact = by_definition(copy.deepcopy(attention).double(), tokens.double())
    with torch.autocast("cpu", torch.bfloat16):
        output, plain = attention(tokens), by_definition(attention, tokens)
    assert output.dtype == torch.bfloat16
    assert rms_error(output, exact) <= rms_limit(exact, plain)
    output.sum().backward()
    assert attention.qkv.weight.grad.dtype == torch.float32


def test_the_projections_are_the_only_state():
    attention = layer()
    names = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert attention.state_dict().keys() == names
    assert {name for name, _ in attention.named_parameters()} == names
    bare = layer(qkv_bias=False, proj_bias=False)
    assert bare.state_dict().keys() == {"qkv.weight", "proj.weight"}
    assert not list(attention.buffers())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_copies_are_equal_and_independent(mixing, copied):
    attention = layer(mixing)
    before = attention(video())
    other = copied(attention)
    assert other.mixing == mixing
    assert torch.equal(other(video()), before)
    redraw(other, seed=3)
    assert torch.equal(attention(video()), before)
    assert not torch.equal(other(video()), before)


@pytest.mark.parametrize("shape", [(0, TOKENS, DIM), (0, FRAMES, TOKENS, DIM)], ids=str)
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_an_empty_batch_gives_an_empty_result_and_no_gradient(mixing, shape):
    results = output_and_gradients(layer(mixing), video(*shape))
    assert results.pop("output").shape == shape
    assert results.pop("tokens").shape == shape
    assert len(results) == 4
    for name, gradient in results.items():
        assert gradient.eq(0).all(), name


def test_functional_call():
    attention, other = layer(), redraw(layer(), seed=5)
    before = attention(video())
    parameters = dict(other.named_parameters())
    called = torch.func.functional_call(attention, parameters, (video(),))
    assert torch.equal(called, other(video()))
    assert torch.equal(attention(video()), before)

    def loss(weights):
        return torch.func.functional_call(attention, weights, (video(),)).square().sum()

    gradients = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    other(video()).square().sum().backward()
    for name, parameter in other.named_parameters():
        assert max_error(gradients[name], parameter.grad) < 1e-11, name


def test_backend_argument_is_passed_on():
    with pytest.raises(ValueError, match=r"^unknown backend 'fast' \(argument backend\)"):
        layer(backend="fast")(video())
    assert torch.equal(layer(backend="eager")(video()), layer(backend="eager")(video()))


def build(dim=DIM, num_heads=HEADS, num_frames=FRAMES, mixing="released", **arguments):
    return tm.TokenMixAttention(dim, num_heads, num_frames, mixing, **arguments)


WRONG_CALLS = {
    "dim": (lambda: build(dim=13), "dim = 13 must be a multiple of num_heads = 3"),
    "no heads": (lambda: build(num_heads=0), "dim = 12 must be a multiple of num_heads = 0"),
    "no frames": (
        lambda: build(num_frames=0),
        "num_frames must be a whole number, at least 1, got 0",
    ),
    "queries": (
        lambda: build(queries="patches"),
        "queries must be 'all' or 'prefix', got 'patches'",
    ),
    "no prefix tokens to query": (
        lambda: build(queries="prefix", num_prefix_tokens=0),
        "queries='prefix' needs num_prefix_tokens >= 1",
    ),
    "mixing": (
        lambda: build(mixing="mixed"),
        "mixing must be a Mixing or one of 'paper', 'released', 'spatial', 'adjacent', "
        "'temporal', 'joint', got 'mixed'",
    ),
    "frames do not divide the batch": (
        lambda: build()(torch.zeros(6, TOKENS, DIM)),
        "tokens must be [batch * num_frames, num_tokens, dim] or [batch, num_frames, num_tokens, "
        "dim] with num_frames = 4, got [6, 10, 12]; tokenmix_ops.set_num_frames changes it",
    ),
    "other frames": (
        lambda: build()(torch.zeros(4, 8, TOKENS, DIM)),
        "tokens must be [batch * num_frames, num_tokens, dim] or [batch, num_frames, num_tokens, "
        "dim] with num_frames = 4, got [4, 8, 10, 12]; tokenmix_ops.set_num_frames changes it",
    ),
    "features": (
        lambda: build()(torch.zeros(8, TOKENS, 11)),
        "tokens must have dim = 12 features, got [8, 10, 11]",
    ),
    "negative prefix": (
        lambda: build(num_prefix_tokens=-1),
        "num_prefix_tokens must not be negative, got -1",
    ),
    "backend": (
        lambda: build(backend="fast"),
        "unknown backend 'fast' (argument backend); known: 'triton', 'cpu', 'eager'",
    ),
    "dimensions": (
        lambda: build()(torch.zeros(8, DIM)),
        "tokens must be [batch * num_frames, num_tokens, dim] or [batch, num_frames, num_tokens, "
        "dim] with num_frames = 4, got [8, 12]; tokenmix_ops.set_num_frames changes it",
    ),
    "nothing but prefix tokens": (
        lambda: build()(torch.zeros(4, 1, DIM)),
        "num_tokens must exceed num_prefix_tokens, which must not be negative; got num_tokens = "
        "1, num_prefix_tokens = 1",
    ),
    "changed to no frames": (
        lambda: tm.set_num_frames(build(), 0),
        "num_frames must be a whole number, at least 1, got 0",
    ),
    "nothing mixes": (
        lambda: tm.set_num_frames(nn.Linear(2, 2), 4),
        "Linear has no token-mixing layer; call mix_tokens first",
    ),
    "index outside the video": (
        lambda: build(mixing=tm.Mixing.from_index([40]))(torch.zeros(4, TOKENS, DIM)),
        "key_index names token 40, but a video of 4 frames of 10 tokens ends at 39",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_CALLS)
def test_wrong_calls_are_named(wrong, assert_says):
    assert_says(*WRONG_CALLS[wrong])
