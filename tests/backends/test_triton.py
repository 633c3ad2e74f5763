"""The Triton kernels, on a GPU or under Triton's interpreter: what the product of all cases, dtypes
and backends in tests/test_functional.py leaves open."""

import dataclasses
import math
import os

import pytest
import torch
from agreement import (
    assert_agrees,
    assert_case_agrees,
    assert_within,
    compute,
    expected,
    oracle,
    random_cases,
)
from fused_emulation import to_tf32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tokenmix_ops as tm
from tokenmix_ops import ops
from tokenmix_ops.backends import triton
from tokenmix_ops.backends.triton import configs, launch
from tokenmix_ops.backends.triton.layout import ONE_PASS
from tokenmix_ops.mixing import NAMES
from tokenmix_ops.testing import CASES, MIXINGS, Case, max_error, output_and_gradients
from tokenmix_ops.tolerance import rms_error

pytestmark = pytest.mark.skipif(triton.unavailable() is not None, reason=str(triton.unavailable()))

DEVICE = "cpu" if triton.interpreted() else "cuda"
# On GPUs the kernels that hold all keys are for 16 bits alone.
DTYPE = torch.float32 if DEVICE == "cpu" else torch.float16
KINDS = tuple(name for name in NAMES if name != "temporal")
MIXED = [mixing for mixing in MIXINGS if mixing.kind != "temporal"]
REPEATED = tm.Mixing.from_index(
    [[3, 3, 3, 7], [3, 0, 7, 7], [11, 3, 11, 2]],
    [[-1, 0, 1, 2], [2, 0, 1, -1], [0, 1, 2, -1]],
    cross_frame_gain=0.4,
)
REPEATED_SHARED = tm.Mixing.from_index([3, 3, 9, 3, 0], [-1, 0, 1, 2, 0], cross_frame_gain=0.4)


def case_of(mixing, **shape):
    """A small case: the interpreter's time is per program."""
    return Case(mixing, **{"batch": 1, "num_heads": 1, **shape})


def fast(case, **arguments):
    return compute(case, "triton", **arguments)


def random_like(tensor, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)


def by_token(case):
    return case.plan.num_full_tokens is None and case.layout != "selected"


# The interpreter takes seconds for a video of ViT-B/16's size.
ALL_SMALL = [
    pytest.param(
        dataclasses.replace(case, batch=1, num_heads=1),
        marks=pytest.mark.slow if case.num_tokens == 197 and DEVICE == "cpu" else (),
        id=str(dataclasses.replace(case, batch=1, num_heads=1)),
    )
    for case in CASES
    if case.head_dim <= 64 and case.mixing.kind != "temporal"
]


@pytest.mark.parametrize("case", ALL_SMALL)
def test_both_algorithms_agree_with_float64(case, algorithm, ran):
    assert_case_agrees(fast(case), case, DTYPE, DEVICE)
    size = (8 * DTYPE.itemsize, case.head_dim, case.plan.num_keys)
    find = launch.architecture(torch.device(DEVICE)).find
    forward = ["fwd_resident"] if find("fwd_resident", *size) else ["fwd_streamed"]
    held = find("bwd_resident", *size) and not by_token(case)
    assert ran == forward + (["bwd_resident"] if held else ["bwd_query", "bwd_key"])
    if DEVICE == "cpu":
        assert forward == [{"resident": "fwd_resident", "streamed": "fwd_streamed"}[algorithm]]


def shape_of(config):
    return config.kernel, config.dtype_bits, config.BLOCK_M, config.BLOCK_N


SHAPES = {
    shape_of(c): c
    for path in sorted(configs.FOLDER.glob("*.json"))
    for c in configs.load(path.stem).configs
}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_every_tile_shape_that_ships_agrees_with_float64(shape, launch_by, ran):
    kernel, bits, *_ = shape
    config = SHAPES[shape]
    if DEVICE == "cuda":
        own = launch.architecture(torch.device(DEVICE))
        config = next((c for c in own.configs if shape_of(c) == shape), None)
        if config is None:
            pytest.skip(f"not a tile shape of {own.name}, whose programs it may not fit")
    if kernel == "bwd_resident":
        config = dataclasses.replace(config, programs_per_sm=0)
    launch_by(
        lambda own: (
            config,
            *(c for c in own if c.kernel != kernel and not c.kernel.endswith("resident")),
        )
    )
    dtype = {16: torch.float16, 32: torch.float32}[bits]
    # Two tiles or more of keys and of queries up to 64 wide, the last ones ragged.
    num_tokens = min(max(config.BLOCK_N, config.BLOCK_M // 2), 64) + 6
    # A compiler lays narrower heads out otherwise; for a program, the head is as long as its tile.
    head_dim = config.head_dim if DEVICE == "cuda" else 16
    for mixing in (tm.Mixing.released(), tm.Mixing.adjacent())[: 1 + (kernel == "bwd_key")]:
        case = case_of(mixing, num_frames=2, num_tokens=num_tokens, head_dim=head_dim)
        assert_case_agrees(fast(case), case, dtype, DEVICE)
    assert kernel in ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 16, 24, 40, 64, 80, 96, 128, 192, 256])
def test_every_head_dim_agrees_with_float64(head_dim, dtype):
    # 64 keys: the interpreter rounds products of tiles of another width, as 13 have, otherwise, and
    # weights computed again for the gradients must be those of the output.
    case = case_of(tm.Mixing.released(), num_frames=2, num_tokens=63, head_dim=head_dim)
    assert case.plan.num_keys == 64
    assert_case_agrees(fast(case), case, dtype, DEVICE)


@settings(max_examples=12)
@given(random_cases(kinds=(*KINDS, "from_index"), max_batch=2, max_heads=2))
def test_any_mixing_of_any_shape_agrees_with_float64(case):
    assert_case_agrees(fast(case), case, torch.float32, DEVICE)


@pytest.mark.parametrize("mixing", [REPEATED, REPEATED_SHARED], ids=repr)
def test_uses_of_one_token_add_up_in_its_gradient(mixing, algorithm):
    case = case_of(mixing, num_frames=3, num_tokens=4)
    assert_case_agrees(fast(case), case, DTYPE, DEVICE)


def room(tensor, guard):
    """A tensor's numbers as a view of more memory: guards before, after and between its rows."""
    memory = tensor.new_full([n + 2 for n in tensor.shape], guard)
    view = memory[(slice(1, -1),) * tensor.dim()]
    return memory, view.copy_(tensor)


def contiguous_room(tensor, guard):
    memory = tensor.new_full([tensor.numel() + 256], guard)
    return memory, memory[128:-128].view(tensor.shape).copy_(tensor)


def same_bits(left, right):
    bits = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))


@pytest.mark.parametrize("mixing", MIXED, ids=repr)
def test_nothing_is_read_or_written_but_the_rows_of_the_tensors(mixing, algorithm, monkeypatch):
    case = case_of(mixing, num_heads=2, head_dim=12)
    read, written = [], []

    def given(tensor, make=room, guard=math.nan):
        memory, view = make(tensor.detach(), guard)
        read.append((memory, memory.clone()))
        return view

    def returned(tensors):
        rooms = [contiguous_room(t, math.nan) for t in tensors]
        written.extend(rooms)
        return tuple(view for _, view in rooms)

    empty_output, empty_gradients = ops.empty_output, ops.empty_gradients
    monkeypatch.setattr(ops, "empty_output", lambda *t: returned(empty_output(*t)))
    monkeypatch.setattr(ops, "empty_gradients", lambda *t: returned(empty_gradients(*t)))
    inputs = tuple(given(t) for t in case.inputs(DTYPE, DEVICE))
    output_grad = given(random_like(inputs[0]))
    plan = case.plan_on(DEVICE)
    beyond = case.num_frames * case.num_tokens
    tables = {
        name: given(getattr(plan, name), contiguous_room, beyond)
        for name in ("key_index", "key_frame", "token_order", "use_start", "uses")
    }
    plan = dataclasses.replace(plan, **tables)

    def attention(q, k, v):
        return tm.token_mix_attention(q, k, v, mixing=plan, backend="triton")

    assert_agrees(attention, case, inputs, output_grad)
    assert all(same_bits(memory, before) for memory, before in read)
    assert len(written) == 5
    for memory, view in written:
        assert view.isfinite().all()
        assert memory[:128].isnan().all()
        assert memory[-128:].isnan().all()


def unselected(case):
    tokens = torch.ones(case.num_frames * case.num_tokens, dtype=torch.bool)
    tokens[case.plan.key_index.flatten().long()] = False
    return tokens


@pytest.mark.parametrize("mixing", [*MIXED, REPEATED_SHARED], ids=repr)
def test_unselected_tokens_get_exact_zeros_and_no_others_do(mixing, algorithm):
    case = case_of(mixing)
    inputs = case.inputs(DTYPE, DEVICE)
    results = output_and_gradients(fast(case), inputs, random_like(inputs[0]))
    for name in ("key gradient", "value gradient"):
        tokens = results[name].flatten(1, 2)
        assert tokens[:, unselected(case)].eq(0).all()
        assert tokens[:, ~unselected(case)].ne(0).any(-1).all()


@pytest.mark.parametrize("part", range(4), ids=["query", "key", "value", "output_grad"])
@pytest.mark.parametrize("mixing", [tm.Mixing.released(), REPEATED, REPEATED_SHARED], ids=repr)
def test_zeros_of_unselected_tokens_are_exact_beside_nan(mixing, part, algorithm):
    case = case_of(mixing, num_frames=3, num_tokens=4)
    assert unselected(case).any()
    inputs = [t.detach() for t in case.inputs(DTYPE, DEVICE)]
    inputs.append(random_like(inputs[0]))
    inputs[part].fill_(math.nan)
    results = output_and_gradients(fast(case), tuple(inputs[:3]), inputs[3])
    for name in ("key gradient", "value gradient"):
        assert results[name].flatten(1, 2)[:, unselected(case)].eq(0).all(), name


@pytest.mark.parametrize(
    "mixing",
    [tm.Mixing.released(), tm.Mixing.adjacent(), tm.Mixing.joint(), REPEATED, REPEATED_SHARED],
    ids=repr,
)
def test_the_same_video_gives_the_same_bits_beside_any_other(mixing, algorithm):
    case = case_of(mixing, batch=2, num_frames=3, num_tokens=7)
    inputs = case.inputs(DTYPE, DEVICE)
    output_grad = random_like(inputs[0])
    beside = tuple(t.detach().clone() for t in (*inputs, output_grad))
    for tensor in beside:
        tensor[1] = math.nan
    once = output_and_gradients(fast(case), inputs, output_grad)
    for _ in range(1 if DEVICE == "cpu" else 20):
        again = output_and_gradients(fast(case), beside[:3], beside[3])
        for name, value in once.items():
            assert torch.equal(again[name][0], value[0]), name


@pytest.mark.parametrize("gain", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("scale", [None, -0.7, 0.0])
def test_any_scale_and_gain(scale, gain, algorithm):
    case = case_of(tm.Mixing.released(cross_frame_gain=gain))
    inputs = case.inputs(DTYPE, DEVICE)
    assert_agrees(fast(case, scale=scale), case, inputs, scale=scale)


# Frames take turns among the keys, which kernels use where their number is a power of two.
@settings(max_examples=20)
@given(st.data())
def test_any_number_of_frames_with_a_gain_agrees_with_float64(data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    gain = draw(0.0, 0.5, 1.7)
    prefix, patches = draw(0, 1, 3), data.draw(st.integers(1, 20))
    case = case_of(
        getattr(tm.Mixing, draw("released", "paper"))(cross_frame_gain=gain),
        num_frames=draw(1, 2, 3, 4, 8, 16),
        num_tokens=prefix + patches,
        num_prefix_tokens=prefix,
        layout=draw("contiguous", "selected"),
    )
    assert_case_agrees(fast(case), case, torch.float32, DEVICE)


MANY = {
    "gain": tm.Mixing.released(),
    "gain 0": tm.Mixing.released(cross_frame_gain=0.0),
    "no gain": tm.Mixing.released(cross_frame_gain=1.0),
    "frames out of turn": tm.Mixing.adjacent((0, 1), wrap=True, cross_frame_gain=0.5),
}


@pytest.mark.parametrize("scale", [None, -0.7])
@pytest.mark.parametrize("mixing", MANY.values(), ids=list(MANY))
def test_more_keys_than_one_pass_takes_can_be_held(mixing, scale, launch_by, ran):
    case = case_of(mixing, num_frames=2, num_tokens=ONE_PASS + 5)
    assert case.plan.num_keys > ONE_PASS
    bits = 8 * DTYPE.itemsize
    held = configs.Config("fwd_resident", bits, 64, 640, 128, 128, 4 if DEVICE == "cpu" else 8, 1)
    launch_by(lambda own: (held, *(c for c in own if c.kernel != "fwd_resident")))
    assert_agrees(fast(case, scale=scale), case, case.inputs(DTYPE, DEVICE), scale=scale)
    assert ran[0] == "fwd_resident"


@given(st.integers(1, 10_000), st.integers(1, 300), st.integers(1, 800))
def test_programs_take_all_tiles_in_the_fewest_turns(groups, tiles, at_once):
    each = launch.tiles_per_program(groups, tiles, at_once)
    assert 1 <= each <= tiles

    def turns(each):
        """Of all programs, one for loading keys."""
        programs = groups * math.ceil(tiles / each)
        return math.ceil(programs / at_once) * (each + 1)

    assert turns(each) == min(turns(one) for one in range(1, tiles + 1))


def minus_infinity(query, keys, values, first):
    query[..., 3] = query[..., 3].abs() + 0.1
    keys[0, first, 0, 3] = -math.inf


def all_minus_infinity(query, keys, values, first):
    query[..., 3] = query[..., 3].abs() + 0.1
    keys[..., 3] = -math.inf


SPOILED = {
    "query NaN": lambda query, keys, values, first: query[0, 1, 2, 0, 3].fill_(math.nan),
    "query inf": lambda query, keys, values, first: query[0, 1, 2, 0, 3].fill_(math.inf),
    "key NaN": lambda query, keys, values, first: keys[0, first, 0, 3].fill_(math.nan),
    "key inf": lambda query, keys, values, first: keys[0, first, 0, 3].fill_(math.inf),
    "value NaN": lambda query, keys, values, first: values[0, first, 0, 3].fill_(math.nan),
    "value inf": lambda query, keys, values, first: values[0, first, 0, 3].fill_(math.inf),
    "a logit -inf": minus_infinity,
    "all logits -inf": all_minus_infinity,
}


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("mixing", [tm.Mixing.released(), tm.Mixing.adjacent()], ids=repr)
def test_what_is_not_finite_spreads_as_in_the_definition(mixing, spoil, algorithm):
    case = case_of(mixing, num_frames=3, num_tokens=4)
    query, key, value = (t.detach() for t in case.inputs(DTYPE, DEVICE))
    first = int(case.plan.key_index[0, 1])
    SPOILED[spoil](query, key.flatten(1, 2), value.flatten(1, 2), first)
    output_grad = random_like(query)
    doubles = tuple(t.double() for t in (query, key, value))
    exact = output_and_gradients(oracle(case), doubles, output_grad)
    found = output_and_gradients(fast(case), (query, key, value), output_grad)
    assert any(value.isnan().any() for value in exact.values())
    # Keys of one tile go through products together, unused ones and rows past the last query too:
    # there NaN may reach the gradients of more keys than in the definition, never of fewer.
    spreads = by_token(case) or (spoil == "a logit -inf" and algorithm == "resident")
    for name, value in exact.items():
        if spreads and name in ("key gradient", "value gradient"):
            assert found[name][value.isnan()].isnan().all(), name
        else:
            wrong = int((found[name].isnan() != value.isnan()).sum())
            assert wrong == 0, f"{name}: {wrong} numbers"


@pytest.mark.parametrize("mixing", [tm.Mixing.released(), tm.Mixing.adjacent()], ids=repr)
def test_float16_near_its_largest_number(mixing, algorithm):
    case = case_of(mixing)
    query, key, value = (t.detach() for t in case.inputs(torch.float16, DEVICE))
    inputs = 8 * query, 8 * key, (2.0**15 * value).clamp(-65504, 65504)
    output_grad = 2.0**-16 * random_like(query)
    results = output_and_gradients(fast(case), inputs, output_grad)
    assert results["output"].abs().amax() > 60000
    assert_within(expected(case, inputs, output_grad), results, torch.float16)


@pytest.mark.parametrize("mixing", [tm.Mixing.released(cross_frame_gain=0.5), tm.Mixing.adjacent()])
def test_logits_far_from_zero(mixing, algorithm):
    case = case_of(mixing, num_frames=2)
    query, key, value = (t.detach() for t in case.inputs(torch.float32, DEVICE))
    query[..., 0], key[..., 0] = 60.0, -60.0
    assert_agrees(fast(case), case, (query, key, value))


def test_gradients_of_keys_that_overlap_in_memory(algorithm):
    case = case_of(tm.Mixing.released(), num_frames=2, num_tokens=5)
    query, _, value = (t.detach() for t in case.inputs(DTYPE, DEVICE))
    # [1, 2, 5, 4, 16] of which heads overlap: a dense tensor like it has another stride last.
    key = random_like(query.new_empty(1, 2, 5, 19)).unfold(-1, 16, 1)
    query, value = query.repeat(1, 1, 1, 4, 1), value.repeat(1, 1, 1, 4, 1)
    assert torch.empty_like(key).stride(-1) != 1
    assert_agrees(fast(case), case, (query, key, value))


@pytest.fixture
def fp32_precision():
    """Sets PyTorch's precision of float32 products for one test."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda setting: setattr(matmul, "fp32_precision", setting)
    matmul.fp32_precision = before


@pytest.fixture
def interpreter_has_tf32(monkeypatch):
    """Rounds what enters a product to TF32 where a kernel asks for it, as a GPU does.

    The interpreter computes such products in float32.
    """
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def rounded(handle):
        return TensorHandle(to_tf32(torch.from_numpy(handle.data)).numpy(), handle.dtype)

    def create(builder, a, b, d, input_precision, *rest):
        if input_precision == ir.INPUT_PRECISION.TF32:
            a, b = rounded(a), rounded(b)
        return create_dot(builder, a, b, d, input_precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create)


@pytest.mark.interfaces
@pytest.mark.skipif(DEVICE != "cpu", reason="tests/backends/test_triton_gpu.py has it for GPUs")
def test_tf32_is_used_only_where_pytorch_allows_it(
    fp32_precision, interpreter_has_tf32, algorithm, ran
):
    case = case_of(tm.Mixing.released(), num_frames=2)
    inputs = tuple(t.detach() for t in case.inputs(torch.float32))
    output_grad = random_like(inputs[0])
    fp32_precision("ieee")
    assert_agrees(fast(case), case, inputs, output_grad)
    ieee = list(ran)
    fp32_precision("tf32")
    found = output_and_gradients(fast(case), inputs, output_grad)
    assert ran == ieee * 2
    for name, budget in expected(case, inputs, output_grad).budgets.items():
        size = float(budget.exact.square().mean().sqrt())
        assert 2**-14 * size < rms_error(found[name], budget.exact) < 2**-8 * size, name


@pytest.mark.parametrize("mixing", MIXED, ids=repr)
def test_fewer_queries_than_tokens(mixing, algorithm):
    case = case_of(mixing)
    query, key, value = case.inputs(DTYPE, DEVICE)
    assert_agrees(fast(case), case, (query[:, :, :3].detach(), key, value))


@pytest.mark.parametrize("num_queries", [1, 10])
@pytest.mark.parametrize(
    "mixing",
    [
        tm.Mixing.released(),
        tm.Mixing.joint(cross_frame_gain=0.8),
        tm.Mixing.from_index([3, 12, 12, 0, 21], [0, 1, 2, -1, 2], cross_frame_gain=0.5),
    ],
    ids=repr,
)
def test_keys_that_come_selected(mixing, num_queries, algorithm):
    case = case_of(mixing, num_heads=2, layout="selected")
    query, key, value = case.inputs(DTYPE, DEVICE)
    assert_agrees(fast(case), case, (query[:, :, :num_queries].detach(), key, value))


GRADIENTS = {
    "one number for all": lambda like: like.new_tensor(0.3).expand_as(like),
    "one number a row": lambda like: random_like(like[..., :1]).expand_as(like),
    "one row for all tokens": lambda like: random_like(like[:, :, :1]).expand_as(like),
    "heads last": lambda like: random_like(like.transpose(3, 4)).transpose(3, 4),
    "padded": lambda like: random_like(like.repeat(1, 1, 2, 1, 2))[:, :, ::2, :, : like.shape[4]],
}


@pytest.mark.parametrize("lie", GRADIENTS)
@pytest.mark.parametrize("mixing", [tm.Mixing.released(), tm.Mixing.adjacent()], ids=repr)
def test_output_gradients_may_lie_anyhow(mixing, lie, algorithm):
    case = case_of(mixing, num_heads=2, num_frames=2, num_tokens=5)
    inputs = case.inputs(DTYPE, DEVICE)
    output_grad = GRADIENTS[lie](inputs[0].detach())
    assert not output_grad.is_contiguous()
    assert_agrees(fast(case), case, inputs, output_grad)


@pytest.mark.parametrize("mixing", [tm.Mixing.released(), tm.Mixing.adjacent()], ids=repr)
def test_inputs_may_be_expanded(mixing, algorithm):
    case = case_of(mixing, num_heads=2, num_frames=2, num_tokens=5, batch=2)
    query, key, value = (t.detach() for t in case.inputs(DTYPE, DEVICE))
    inputs = query[:1].expand_as(query), key[..., :1, :].expand_as(key), value[:, :1].expand_as(key)
    assert_agrees(fast(case), case, inputs)


@pytest.mark.parametrize("layout", ["heads_first", "packed", "selected"])
def test_gradients_lie_as_dense_inputs_do(layout, algorithm):
    case = case_of(tm.Mixing.released(), num_heads=2, batch=2, layout=layout)
    query, key, value = case.inputs(DTYPE, DEVICE)
    output = fast(case)(query, key, value)
    grads = torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
    assert output.is_contiguous()
    assert grads[0].is_contiguous()
    for grad, tensor in zip(grads[1:], (key, value), strict=True):
        assert grad.stride() == torch.empty_like(tensor).stride()
        assert (grad.stride() == tensor.stride()) == (layout != "packed")


@pytest.mark.parametrize("layout", ["contiguous", "selected"])
def test_an_empty_batch_runs_no_kernel(layout, ran):
    case = case_of(tm.Mixing.released(), batch=0, layout=layout)
    inputs = case.inputs(DTYPE, DEVICE)
    output = fast(case)(*inputs)
    output.sum().backward()
    assert output.shape == inputs[0].shape
    assert [t.grad.shape for t in inputs] == [t.shape for t in inputs]
    assert ran == []


class NewMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operators make."""

    def __init__(self, *given):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr(): t for t in given}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in self.known:
                    # Held, so that no later one gets its address.
                    self.known[storage.data_ptr()] = tensor
                    self.bytes += storage.nbytes()
        return result


def bytes_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


LARGER = dict(batch=2, num_frames=3, num_tokens=11, num_heads=2, head_dim=24)


@pytest.mark.parametrize(
    "case",
    [
        case_of(tm.Mixing.released(), layout="packed"),
        Case(tm.Mixing.released(), **LARGER, layout="padded"),
        case_of(tm.Mixing.released(), layout="selected"),
        case_of(tm.Mixing.spatial(), layout="heads_first"),
        Case(tm.Mixing.adjacent(), **LARGER, layout="packed"),
    ],
    ids=str,
)
def test_nothing_is_materialised(case, algorithm):
    inputs = tuple(t.detach() for t in case.inputs(DTYPE, DEVICE))
    plan = case.plan_on(DEVICE)
    output_grad = random_like(inputs[0])
    numbers = ops.numbers_of(plan, 0.25)
    tables = (plan.key_index, plan.key_frame, plan.token_order, plan.use_start, plan.uses)
    with NewMemory(*inputs, *tables) as memory:
        output, lse = launch.forward(*inputs, *tables[:2], *numbers)
    assert lse.numel() == output.numel() // case.head_dim
    assert memory.bytes == bytes_of(output, lse)
    saved = (*inputs, output, lse, *tables)
    with NewMemory(output_grad, *saved) as memory:
        gradients = launch.backward(output_grad, *saved, *numbers)
    delta = 0 if algorithm == "resident" and not by_token(case) else bytes_of(lse)
    assert memory.bytes == bytes_of(*gradients) + delta


FAR = ("batch", "frames", "tokens", "heads")


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("mixing", [tm.Mixing.released(), tm.Mixing.adjacent()], ids=repr)
def test_offsets_beyond_32_bits(mixing, far, algorithm):
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (pages if DEVICE == "cpu" else torch.cuda.mem_get_info()[0]) < 16 * 2**30:
        pytest.skip("needs 16 GiB of memory, though it touches little of it")
    dim = FAR.index(far)
    shape = [1, 2, 3, 1, 16]
    shape[dim] = 1
    strides = list(torch.empty(shape).stride())
    # Neither the stride nor the size is beyond 32 bits, their product is.
    shape[dim], strides[dim] = 3, 2**30
    # Storage, unlike a tensor, is not filled with NaN.
    memory = torch.UntypedStorage(2 * (2**32 + 4096), device=DEVICE)

    def spread(numbers, number):
        empty = torch.empty(0, dtype=torch.float16, device=DEVICE)
        # In the middle, so that an offset gone negative still meets memory of this process.
        return empty.set_(memory, 2**31 + 1024 * number, shape, strides).copy_(numbers)

    case = Case(mixing, *shape[:3], num_heads=shape[3], head_dim=shape[4])
    near = (*(t.detach() for t in case.inputs(torch.float16, DEVICE)),)
    *inputs, output_grad = (spread(t, i) for i, t in enumerate((*near, random_like(near[0]))))
    assert_agrees(fast(case), case, tuple(inputs), output_grad)


@pytest.mark.parametrize("mixing", MIXED, ids=repr)
def test_lse_is_the_logarithm_to_base_2(mixing, algorithm):
    case = case_of(mixing, num_heads=2, batch=2)
    query, key, value = (t.detach() for t in case.inputs(DTYPE, DEVICE))
    plan = case.plan_on(DEVICE)
    numbers = ops.numbers_of(plan, 0.25)
    _, lse = torch.ops.tokenmix_ops.triton_fwd(
        query, key, value, plan.key_index, plan.key_frame, *numbers
    )
    rows = torch.zeros(4) if plan.rows == "shared" else torch.arange(4)
    keys = key.double().flatten(1, 2)[:, plan.key_index[rows.long()].long()]
    logits = 0.25 * torch.einsum("btshd,btmhd->bhtsm", query.double(), keys)
    gains = torch.where(plan.is_cross_frame, plan.cross_frame_gain, 1.0)[:, None]
    exact = (gains * logits).logsumexp(-1) / math.log(2)
    assert lse.shape == exact.shape
    assert max_error(lse, exact) <= 1e-5
