"""The operator against the oracle: every case, dtype and backend; and its properties."""

import math

import pytest
import torch
from agreement import (
    arithmetic_of,
    assert_agrees,
    assert_case_agrees,
    compute,
    oracle,
    random_cases,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention as sdpa

import tokenmix_ops as tm
from tokenmix_ops.backends import BACKENDS, triton
from tokenmix_ops.mixing import NAMES
from tokenmix_ops.testing import (
    CASES,
    DTYPES,
    MIXINGS,
    Case,
    max_error,
    output_and_gradients,
)


def skip_unless_computed(backend, case, inputs):
    chosen = BACKENDS[backend]
    plan = case.plan_on(inputs[0].device)
    refusal = chosen.unavailable() or chosen.unsupported(*inputs, plan)
    if refusal:
        pytest.skip(refusal)


def products():
    """Every case, dtype and backend. Those that the interpreter computes in 16 bits differ from
    float32 by conversions alone: a third of the cases shows these, the others are slow."""
    interpreted = triton.unavailable() is None and triton.interpreted()
    for number, case in enumerate(CASES):
        for dtype in DTYPES:
            for backend in BACKENDS:
                again = backend == "triton" and interpreted and dtype.itemsize == 2 and number % 3
                marks = pytest.mark.slow if again else ()
                name = f"{case}-{dtype}-{backend}"
                yield pytest.param(case, dtype, backend, marks=marks, id=name)


@pytest.mark.parametrize(("case", "dtype", "backend"), list(products()))
def test_output_and_gradients_agree_with_float64(case, dtype, backend, device):
    skip_unless_computed(backend, case, case.inputs(dtype, device))
    assert_case_agrees(compute(case, backend), case, dtype, device, arithmetic_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gain", [1.0, 0.8])
@pytest.mark.parametrize(
    "kind", [tm.Mixing.released, tm.Mixing.adjacent], ids=["released", "adjacent"]
)
def test_large_logits_agree_with_float64(kind, gain, dtype, backend, device):
    """Here a rounding of the logits shows, which hides among others where they are small."""
    case = Case(kind(cross_frame_gain=gain))
    query, key, value = (t.detach() for t in case.inputs(dtype, device))
    inputs = (4 * query, 4 * key, value)
    skip_unless_computed(backend, case, inputs)
    assert_agrees(compute(case, backend), case, inputs, arithmetic=arithmetic_of(backend))


@settings(max_examples=150)
@given(random_cases(), st.sampled_from((None, 0.3)))
def test_any_mixing_of_any_shape_agrees_with_the_oracle(case, scale):
    inputs = case.inputs(torch.float64)
    output_grad = torch.ones_like(inputs[0])
    exact = output_and_gradients(oracle(case, scale), inputs, output_grad)
    fast = output_and_gradients(compute(case, scale=scale), inputs, output_grad)
    for name, value in fast.items():
        assert max_error(value, exact[name]) <= 1e-12, name


@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_gradcheck(mixing):
    case = Case(mixing, batch=1, num_heads=2, head_dim=3)
    assert torch.autograd.gradcheck(compute(case), case.inputs(torch.float64))


def test_spatial_equals_plain_attention_of_each_frame():
    case = Case(tm.Mixing.spatial(), num_frames=5, num_tokens=9)
    query, key, value = case.inputs(torch.float64)
    plain = sdpa(*(t.flatten(0, 1).transpose(1, 2) for t in (query, key, value)))
    assert max_error(compute(case)(query, key, value), plain.transpose(1, 2).view_as(query)) < 1e-14


def test_joint_equals_plain_attention_of_the_flattened_video():
    case = Case(tm.Mixing.joint())
    query, key, value = case.inputs(torch.float64)
    plain = sdpa(*(t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)))
    assert max_error(compute(case)(query, key, value), plain.transpose(1, 2).view_as(query)) < 1e-14


@pytest.mark.parametrize("name", ["released", "paper", "joint", "adjacent"])
def test_one_frame_is_plain_attention(name):
    mixed = Case(tm.Mixing.named(name), num_frames=1)
    plain = Case(tm.Mixing.spatial(), num_frames=1)
    inputs = mixed.inputs(torch.float64)
    assert max_error(compute(mixed)(*inputs), compute(plain)(*inputs)) < 1e-14


@settings(max_examples=60)
@given(random_cases())
def test_tokens_that_no_slot_names_get_exactly_zero_gradient(case):
    query, key, value = case.inputs(torch.float64)
    compute(case)(query, key, value).square().sum().backward()
    unnamed = torch.ones(case.num_frames * case.num_tokens, dtype=torch.bool)
    unnamed[case.plan.key_index.flatten().long()] = False
    for tensor in (key, value):
        assert tensor.grad.flatten(1, 2)[:, unnamed].eq(0).all()


def test_the_order_of_keys_does_not_matter():
    index, frame = (
        table[0]
        for table in (
            tm.Mixing.released().plan(4, 10).key_index,
            tm.Mixing.released().plan(4, 10).key_frame,
        )
    )
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    shuffled = Case(tm.Mixing.from_index(index[order], frame[order], cross_frame_gain=0.8))
    case = Case(tm.Mixing.released())
    inputs = case.inputs(torch.float64)
    assert max_error(compute(shuffled)(*inputs), compute(case)(*inputs)) < 1e-14


@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_videos_of_a_batch_do_not_see_each_other(mixing):
    case = Case(mixing, batch=3)
    query, key, value = case.inputs(torch.float32)
    together = compute(case)(query, key, value)
    for video in range(3):
        one = compute(case)(*(t[video : video + 1] for t in (query, key, value)))
        assert torch.equal(one[0], together[video])


@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_fewer_queries_give_the_first_rows(mixing):
    case = Case(mixing, num_prefix_tokens=2)
    query, key, value = case.inputs(torch.float64)
    rows = compute(case)(query[:, :, :2], key, value)
    assert max_error(rows, compute(case)(query, key, value)[:, :, :2]) < 1e-14


@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_attention_weights_are_those_of_the_operator(mixing):
    case = Case(mixing)
    query, key, value = case.inputs(torch.float64)
    weights = tm.attention_weights(query, key, mixing=mixing)
    assert weights.shape == (2, 4, 3, 10, case.plan.num_keys)
    rows = {"shared": lambda t, s: 0, "frame": lambda t, s: t, "token": lambda t, s: s}
    row = torch.tensor([[rows[case.plan.rows](t, s) for s in range(10)] for t in range(4)])
    mixed = value.flatten(1, 2)[:, case.plan.key_index[row].long()]
    output = torch.einsum("bthsm,btsmhd->btshd", weights, mixed)
    assert max_error(compute(case)(query, key, value), output) < 1e-14


def allocated_bytes(attention, inputs):
    with torch.profiler.profile(profile_memory=True) as profile:
        attention(*inputs)
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())


def output_and_lse_bytes(case):
    queries = case.batch * case.num_frames * case.num_tokens * case.num_heads
    return 4 * queries * (case.head_dim + 1)


@pytest.mark.parametrize("mixing", ["spatial", "joint"])
def test_views_of_a_packed_projection_are_not_copied(mixing):
    shape = dict(batch=1, num_frames=8, num_tokens=65, head_dim=32)
    case = Case(tm.Mixing.named(mixing), layout="packed", **shape)
    inputs = [t.detach() for t in case.inputs(torch.float32)]
    scratch = 2**19
    assert allocated_bytes(compute(case), inputs) <= output_and_lse_bytes(case) + scratch


@pytest.mark.parametrize("mixing", ["released", "paper"])
def test_shared_keys_are_not_repeated_for_each_frame(mixing):
    shape = dict(batch=2, num_frames=16, num_tokens=197, head_dim=32)
    case = Case(getattr(tm.Mixing, mixing)(cross_frame_gain=1.0), layout="packed", **shape)
    inputs = [t.detach() for t in case.inputs(torch.float32)]
    selected = 2 * 4 * case.batch * case.plan.num_keys * case.num_heads * case.head_dim
    scratch = 2**19
    limit = output_and_lse_bytes(case) + selected + scratch
    assert allocated_bytes(compute(case), inputs) <= limit
    assert limit < output_and_lse_bytes(case) + case.num_frames * selected


@pytest.mark.interfaces
@pytest.mark.parametrize("mixing", [*NAMES, "made inside"])
def test_torch_compile_makes_one_graph(mixing):
    def attention(q, k, v):
        inside = tm.Mixing.released(cross_frame_gain=0.7)
        return tm.token_mix_attention(q, k, v, mixing=inside if mixing == "made inside" else mixing)

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        inputs = Case(tm.Mixing.released(), batch=batch).inputs(torch.float32)
        grad = torch.ones_like(inputs[0])
        eager, graph = (output_and_gradients(f, inputs, grad) for f in (attention, compiled))
        for name, value in graph.items():
            assert max_error(value, eager[name]) <= 1e-5, name


def test_torch_compile_follows_changing_sizes_and_gains():
    def attention(x, gain):
        mixing = tm.Mixing.released(cross_frame_gain=gain)
        return tm.token_mix_attention(x, x, x, mixing=mixing)

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for frames, tokens, gain in ((3, 7, 0.8), (3, 8, 0.8), (3, 8, 0.7), (5, 8, 0.6), (2, 9, 1.0)):
        x = torch.randn(2, frames, tokens, 2, 4)
        assert torch.allclose(compiled(x, gain), attention(x, gain), atol=1e-6)
    torch._dynamo.reset()
    dynamic = torch.compile(
        lambda x, mixing: tm.token_mix_attention(x, x, x, mixing=mixing),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for mixing in ("paper", tm.Mixing.released(), tm.Mixing.adjacent((1,))):
        for batch in (2, 3):
            x = torch.randn(batch, 4, 9, 2, 4)
            output = tm.token_mix_attention(x, x, x, mixing=mixing)
            assert torch.allclose(dynamic(x, mixing), output, atol=1e-6)


def test_autocast_lowers_the_precision_but_not_of_float64():
    inputs = Case(tm.Mixing.released()).inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert tm.token_mix_attention(*inputs, mixing="released").dtype == torch.bfloat16
        doubles = [t.double() for t in inputs]
        assert tm.token_mix_attention(*doubles, mixing="released").dtype == torch.float64
        query, key, value = inputs
        mixed = (query, key.to(torch.bfloat16), value)
        assert tm.token_mix_attention(*mixed, mixing="released").dtype == torch.bfloat16
        assert tm.explain(*mixed, "released").backend in tm.available_backends()


@pytest.mark.interfaces
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms():
    case = Case(tm.Mixing.released(cross_frame_gain=0.9))
    query, key, value = (t.detach() for t in case.inputs(torch.float64))
    stacked = torch.func.vmap(compute(case))(*(t.unsqueeze(1) for t in (query, key, value)))
    assert max_error(stacked.squeeze(1), compute(case)(query, key, value)) < 1e-14
    last = torch.func.vmap(compute(case), in_dims=5)(
        *(t.movedim(0, -1)[None] for t in (query, key, value))
    )
    assert max_error(last.squeeze(1), compute(case)(query, key, value)) < 1e-14
    grad = torch.func.grad(lambda q: compute(case)(q, key, value).square().sum())(query)
    leaf = query.clone().requires_grad_()
    compute(case)(leaf, key, value).square().sum().backward()
    assert max_error(grad, leaf.grad) < 1e-13


@pytest.mark.interfaces
def test_fake_tensors_pass_through():
    with FakeTensorMode():
        inputs = [torch.empty(2, 4, 11, 3, 16) for _ in range(3)]
        output = tm.token_mix_attention(*inputs, mixing="released")
    assert output.shape == (2, 4, 11, 3, 16)
    real = torch.randn(2, 4, 11, 3, 16)
    assert tm.token_mix_attention(real, real, real, mixing="released").isfinite().all()


@pytest.mark.parametrize("mixing", NAMES)
def test_an_empty_batch_gives_an_empty_result(mixing):
    inputs = Case(tm.Mixing.released(), batch=0).inputs(torch.float32)
    output = tm.token_mix_attention(*inputs, mixing=mixing)
    assert output.shape == inputs[0].shape
    output.sum().backward()
    assert all(t.grad.shape == t.shape for t in inputs)


def test_nan_stays_visible_and_stays_in_its_video():
    case = Case(tm.Mixing.released())
    query, key, value = (t.detach() for t in case.inputs(torch.float32))
    key[0].flatten(0, 1)[case.plan.key_index[0, 3]] = math.nan
    output = compute(case)(query, key, value)
    assert output[0].isnan().all()
    assert output[1].isfinite().all()


def five(*shape, dtype=torch.float32):
    return torch.zeros(shape or (2, 4, 10, 3, 16), dtype=dtype)


def call(query=None, key=None, value=None, mixing="released", **arguments):
    query, key, value = (five() if t is None else t for t in (query, key, value))
    return tm.token_mix_attention(query, key, value, mixing=mixing, **arguments)


WRONG_CALLS = {
    "query dimensions": (
        lambda: call(five(2, 40, 3, 16)),
        "query must be [batch, num_frames, num_queries, num_heads, head_dim], none but batch of "
        "size 0, got [2, 40, 3, 16]",
    ),
    "no frames": (
        lambda: call(five(2, 0, 10, 3, 16)),
        "query must be [batch, num_frames, num_queries, num_heads, head_dim], none but batch of "
        "size 0, got [2, 0, 10, 3, 16]",
    ),
    "frames of key": (
        lambda: call(key=five(2, 3, 10, 3, 16)),
        "key must be [batch, num_frames, num_tokens, num_heads, head_dim] = [2, 4, 10, 3, 16], "
        "got [2, 3, 10, 3, 16]",
    ),
    "batch of value": (
        lambda: call(value=five(1, 4, 10, 3, 16)),
        "value must be [batch, num_frames, num_tokens, num_heads, head_dim] = [2, 4, 10, 3, 16], "
        "got [1, 4, 10, 3, 16]",
    ),
    "selected keys": (
        lambda: call(key=five(2, 12, 3, 16), value=five(2, 12, 3, 16)),
        "key must be [batch, num_keys, num_heads, head_dim] = [2, 13, 3, 16], got [2, 12, 3, 16]",
    ),
    "selected keys of a mixing by frame": (
        lambda: call(key=five(2, 10, 3, 16), value=five(2, 10, 3, 16), mixing="spatial"),
        "key is already selected (4 dimensions), but Mixing.spatial() has no key set that all "
        "frames share; pass [batch, num_frames, num_tokens, num_heads, head_dim]",
    ),
    "more queries than tokens": (
        lambda: call(five(2, 4, 11, 3, 16)),
        "query has 11 queries a frame, but key only 10 tokens a frame",
    ),
    "integers": (
        lambda: call(five(dtype=torch.int32)),
        "query must be float16, bfloat16, float32 or float64, got torch.int32",
    ),
    "mixed dtypes": (
        lambda: call(key=five(dtype=torch.float16)),
        "key must have the dtype and device of query, torch.float32 on cpu, got torch.float16 on "
        "cpu",
    ),
    "mixed devices": (
        lambda: call(value=five().to("meta")),
        "value must have the dtype and device of query, torch.float32 on cpu, got torch.float32 "
        "on meta",
    ),
    "prefix tokens": (
        lambda: call(num_prefix_tokens=10),
        "num_tokens must exceed num_prefix_tokens, which must not be negative; got num_tokens = "
        "10, num_prefix_tokens = 10",
    ),
    "strides": (
        lambda: call(value=five(2, 4, 10, 16, 3).transpose(3, 4)),
        "value must be contiguous in its last dimension, got strides [1920, 480, 48, 1, 3]; call "
        ".contiguous() on it",
    ),
    "mixing": (
        lambda: call(mixing="mixed"),
        "mixing must be a Mixing or one of 'paper', 'released', 'spatial', 'adjacent', "
        "'temporal', 'joint', got 'mixed'",
    ),
    "plan": (
        lambda: call(mixing=tm.Mixing.released().plan(8, 10)),
        "query of 4 frames with 10 queries each does not fit a plan of 8 frames of 10 tokens",
    ),
    "backend": (
        lambda: call(backend="fast"),
        "unknown backend 'fast' (argument backend); known: 'triton', 'cpu', 'eager'",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_CALLS)
def test_wrong_calls_are_named(wrong, assert_says):
    assert_says(*WRONG_CALLS[wrong])
