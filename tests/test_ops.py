"""The operators of backends with kernels of their own, and what PyTorch does with operators."""

import io
import re

import pytest
import torch
from agreement import compute, some_output_grad
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tokenmix_ops as tm
from tokenmix_ops import backends, ops
from tokenmix_ops.backends import BACKENDS
from tokenmix_ops.testing import Case, output_and_gradients

MIXINGS = (
    tm.Mixing.released(),
    tm.Mixing.adjacent(),
    tm.Mixing.from_index([3, 12, 12, 0, 21], [0, 1, 2, -1, 2], cross_frame_gain=0.5),
)
RELEASED = Case(tm.Mixing.released(), batch=2, num_heads=2)


@pytest.fixture(params=[name for name in BACKENDS if name != "eager"])
def backend(request, device):
    """A backend with operators, on a device that it serves."""
    chosen = BACKENDS[request.param]
    inputs = RELEASED.inputs(torch.float32, device)
    reason = chosen.unavailable() or chosen.unsupported(*inputs, RELEASED.plan_on(device))
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def operators(backend):
    space = torch.ops.tokenmix_ops
    return getattr(space, f"{backend}_fwd").default, getattr(space, f"{backend}_bwd").default


def parts(case, device, dtype=torch.float32):
    """Detached inputs, tables and numbers of a case, as the operators take them."""
    inputs = tuple(t.detach() for t in case.inputs(dtype, device))
    plan = case.plan_on(device)
    tables = (plan.key_index, plan.key_frame, plan.token_order, plan.use_start, plan.uses)
    return inputs, tables, ops.numbers_of(plan, 0.25)


def test_schemas_name_what_they_take_and_give(operators):
    plan = ["row_dim", "num_tokens", "num_prefix_tokens", "num_full_tokens"]
    plan += ["cross_frame_gain", "scale"]
    inputs, saved = ["query", "key", "value"], ["output", "lse"]
    tables = ["key_index", "key_frame"]
    inverse = ["token_order", "use_start", "uses"]
    forward, backward = (operator._schema for operator in operators)
    assert [a.name for a in forward.arguments] == [*inputs, *tables, *plan]
    assert [a.name for a in forward.returns] == saved
    wanted = ["output_grad", *inputs, *saved, *tables, *inverse, *plan]
    assert [a.name for a in backward.arguments] == wanted
    assert [a.name for a in backward.returns] == [f"{name}_grad" for name in inputs]


@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_opcheck(mixing, operators, device):
    forward, backward = operators
    case = Case(mixing, batch=2, num_heads=1, layout="packed")
    inputs, tables, numbers = parts(case, device)
    torch.library.opcheck(forward, (*inputs, *tables[:2], *numbers))
    saved = (*inputs, *forward(*inputs, *tables[:2], *numbers), *tables)
    torch.library.opcheck(backward, (some_output_grad(inputs[0]), *saved, *numbers))


LAYOUTS = ("contiguous", "packed", "padded", "heads_first", "selected")
SPECIAL = {
    **{layout: (lambda q, k, v: (q, k, v)) for layout in LAYOUTS},
    "fewer queries": lambda q, k, v: (q[:, :, :3], k, v),
    "expanded": lambda q, k, v: (q, k[:, :1].expand_as(k), v[..., :1, :].expand_as(v)),
    "empty batch": lambda q, k, v: (q[:0], k[:0], v[:0]),
}


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_results_are_like_real_ones(special, dtype, operators, device):
    forward, backward = operators
    layout = special if special in LAYOUTS else "contiguous"
    case = Case(tm.Mixing.released(), batch=2, num_heads=2, num_tokens=5, layout=layout)
    inputs, tables, numbers = parts(case, device, dtype)
    inputs = SPECIAL[special](*inputs)
    given = (*inputs, *tables[:2], *numbers)
    real = forward(*given)
    saved = (some_output_grad(inputs[0]), *inputs, *real, *tables, *numbers)
    real += backward(*saved)
    with FakeTensorMode() as mode:
        given, saved = (
            [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            for arguments in (given, saved)
        )
        fake = forward(*given) + backward(*saved)
    for made, pretended in zip(real, fake, strict=True):
        assert pretended.shape == made.shape
        assert pretended.stride() == made.stride()
        assert pretended.dtype == made.dtype
        assert pretended.device == made.device


def assert_same(left, right):
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("marked", [False, True], ids=["found out", "marked"])
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_one_compiled_graph_serves_all_batch_sizes(mixing, marked, backend, device):
    def attention(q, k, v):
        return tm.token_mix_attention(q, k, v, mixing=mixing, backend=backend)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, backend=counter)

    def compiled_for_any_batch(*inputs):
        if marked:
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(*inputs)

    for batch in (2, 3, 5):
        inputs = Case(mixing, batch=batch, num_heads=1).inputs(torch.float32, device)
        output_grad = some_output_grad(inputs[0])
        graph = output_and_gradients(compiled_for_any_batch, inputs, output_grad)
        assert_same(graph, output_and_gradients(attention, inputs, output_grad))
    # The first size alone, then any.
    assert counter.frame_count == (1 if marked else 2)


@pytest.mark.interfaces
def test_one_tensor_may_be_all_three(backend, device):
    def attention(x):
        return tm.token_mix_attention(x, x, x, mixing="released", backend=backend)

    torch._dynamo.reset()
    x = RELEASED.inputs(torch.float32, device)[0]
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x).square().sum(), x) for f in (attention, compiled)]
    assert torch.allclose(*[grad for (grad,) in grads], atol=1e-5)


class Layer(torch.nn.Module):
    """A projection, and the attention of its three parts."""

    def __init__(self, mixing, backend):
        super().__init__()
        self.mixing, self.backend = mixing, backend
        self.project = torch.nn.Linear(6, 24)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.normal_(generator=torch.Generator().manual_seed(i))

    def forward(self, x):
        q, k, v = self.project(x).view(*x.shape[:3], 3, 1, 8).unbind(3)
        return tm.token_mix_attention(q, k, v, mixing=self.mixing, backend=self.backend)


@pytest.mark.interfaces
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_export_keeps_the_operator_and_its_result(mixing, backend, device):
    layer = Layer(mixing, backend).to(device)
    x = torch.randn(2, 4, 10, 6, generator=torch.Generator().manual_seed(0)).to(device)
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=batch)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    targets = [str(node.target) for node in loaded.graph.nodes if node.op == "call_function"]
    assert f"tokenmix_ops.{backend}_fwd.default" in targets
    for inputs in (x, torch.cat((x, x.flip(1), x.flip(2)))):
        with torch.no_grad():
            assert torch.equal(loaded.module()(inputs), layer(inputs))


@pytest.mark.interfaces
def test_flop_counts(backend, device):
    case = RELEASED
    inputs = case.inputs(torch.float32, device)
    product = 2 * case.batch * case.num_heads * (4 * 10) * case.plan.num_keys * case.head_dim
    with FlopCounterMode(display=False) as counter:
        output = compute(case, backend)(*inputs)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 5 * product


def test_autocast_computes_in_its_dtype(backend, device):
    inputs = RELEASED.inputs(torch.float32, device)
    output_grad = some_output_grad(inputs[0])
    with torch.autocast(device, torch.bfloat16):
        cast = output_and_gradients(compute(RELEASED, backend), inputs, output_grad)
    low = [t.detach().bfloat16() for t in inputs]
    plain = output_and_gradients(compute(RELEASED, backend), low, output_grad)
    assert cast["output"].dtype == torch.bfloat16
    assert cast["key gradient"].dtype == torch.float32
    assert_same(cast, {name: value.to(cast[name].dtype) for name, value in plain.items()})


def test_second_derivatives_are_refused_with_a_way_out_that_works(backend, device):
    inputs = RELEASED.inputs(torch.float32, device)
    output = compute(RELEASED, backend)(*inputs)
    way_out = re.escape("backend='eager' inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)")
    with pytest.raises(RuntimeError, match=way_out):
        torch.autograd.grad(output.sum(), inputs, create_graph=True)
    with sdpa_kernel(SDPBackend.MATH):
        output = compute(RELEASED, "eager")(*inputs)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), inputs)
    assert all(grad.isfinite().all() for grad in second)


@pytest.fixture
def preferred(backend, monkeypatch):
    """The backend as the automatic choice, wherever it can compute a call."""
    monkeypatch.setattr(BACKENDS[backend], "not_preferred", lambda *call: None)
    both = {name: BACKENDS[name] for name in (backend, "eager")}
    monkeypatch.setattr(backends, "BACKENDS", both)
    return backend


@pytest.mark.interfaces
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_take_eager(preferred, device):
    query, key, value = (t.detach() for t in RELEASED.inputs(torch.float32, device))
    assert tm.explain(query, key, value, RELEASED.mixing).backend == preferred
    seen = []

    def loss(q, backend=None):
        plan = RELEASED.plan_on(device)
        seen.append(tm.explain(q, key, value, plan).backend)
        return compute(RELEASED, backend)(q, key, value).square().sum()

    leaf = query.clone().requires_grad_()
    loss(leaf, "eager").backward()
    grad = torch.func.grad(loss)(query)
    assert torch.allclose(grad, leaf.grad, atol=1e-5)
    videos = torch.func.vmap(loss)(query[:, None].expand(-1, 2, -1, -1, -1, -1))
    assert videos.isfinite().all()
    assert seen == [preferred, "eager", "eager"]
    with pytest.raises(RuntimeError, match=r"does not support torch\.func transforms; request"):
        torch.func.grad(lambda q: loss(q, preferred))(query)


@pytest.mark.interfaces
@pytest.mark.parametrize("part", [0, 1, 2])
def test_forward_mode_derivatives_are_refused(part, preferred, device):
    inputs = [t.detach() for t in RELEASED.inputs(torch.float32, device)]
    with forward_ad.dual_level():
        inputs[part] = forward_ad.make_dual(inputs[part], some_output_grad(inputs[part]))
        assert tm.explain(*inputs, RELEASED.mixing).backend == "eager"
        with pytest.raises(RuntimeError, match="forward-mode"):
            compute(RELEASED, preferred)(*inputs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(use_reentrant, backend, device):
    inputs = RELEASED.inputs(torch.float32, device)
    attention = compute(RELEASED, backend)

    def again(*leaves):
        output = checkpoint(attention, *leaves, use_reentrant=use_reentrant)
        output.sum().backward()
        return [leaf.grad for leaf in leaves]

    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    ones = torch.ones_like(inputs[0])
    plain = output_and_gradients(attention, inputs, ones)
    for grad, name in zip(again(*leaves), list(plain)[1:], strict=True):
        assert torch.equal(grad, plain[name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_bits_are_the_same(mode, backend, device):
    mixing = tm.Mixing.released(cross_frame_gain=0.8125)
    case = Case(mixing, batch=1, num_heads=2)
    inputs = case.inputs(torch.float32, device)
    # The plan is made in the mode, and used outside of it.
    with mode():
        without = compute(case, backend)(*inputs)
    assert not without.requires_grad
    output = compute(case, backend)(*inputs)
    output.sum().backward()
    assert torch.equal(output, without)


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_only_what_needs_a_gradient_gets_one(needed, backend, device):
    inputs = RELEASED.inputs(torch.float32, device)
    output_grad = some_output_grad(inputs[0])
    all_of_them = output_and_gradients(compute(RELEASED, backend), inputs, output_grad)
    leaves = [t.detach().requires_grad_(i == needed) for i, t in enumerate(inputs)]
    compute(RELEASED, backend)(*leaves).backward(output_grad)
    assert [leaf.grad is not None for leaf in leaves] == [i == needed for i in range(3)]
    assert torch.equal(leaves[needed].grad, list(all_of_them.values())[1 + needed])
