"""A call like an earlier one skips validation, plan and choice; one that differs does not."""

import pytest
import torch
from agreement import compute
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

import tokenmix_ops as tm
from tokenmix_ops import backends, functional
from tokenmix_ops.backends import eager
from tokenmix_ops.testing import Case

CASE = Case(tm.Mixing.released(), batch=2, num_heads=2)


@pytest.fixture
def inputs():
    return [t.detach() for t in CASE.inputs(torch.float32)]


@pytest.fixture
def validated(monkeypatch):
    """The plans of the calls that were validated."""
    plans, check = [], functional._checked

    def checked(*arguments):
        plans.append(check(*arguments))
        return plans[-1]

    monkeypatch.setattr(functional, "_checked", checked)
    return plans


def call(query, key, value, mixing="released", **arguments):
    return tm.token_mix_attention(query, key, value, mixing=mixing, **arguments)


def test_only_the_first_of_equal_calls_is_validated(inputs, validated):
    first = call(*inputs)
    again = call(*(t.clone() for t in inputs))
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert torch.equal(again, first)
    assert torch.equal(call(*leaves), first)
    assert len(validated) == 1


CHANGES = {
    "query's strides": (lambda q, k, v: (q.mT.contiguous().mT, k, v), "query must be contiguous"),
    "value's strides": (lambda q, k, v: (q, k, v.mT.contiguous().mT), "value must be contiguous"),
    "key's dtype": (lambda q, k, v: (q, k.double(), v), "key must have the dtype"),
    "value's dtype": (lambda q, k, v: (q, k, v.double()), "value must have the dtype"),
    "value's device": (lambda q, k, v: (q, k, v.to("meta")), "value must have the dtype and dev"),
    "query's shape": (lambda q, k, v: (q[:1], k, v), "key must be"),
    "value's shape": (lambda q, k, v: (q, k, v[:, :1]), "value must be"),
    "no dimensions": (lambda q, k, v: (q[0, 0, 0, 0, 0], k, v), "query must be"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_change_of_a_tensor_is_validated(changed, inputs):
    call(*inputs)
    change, message = CHANGES[changed]
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            call(*change(*inputs))


@pytest.mark.parametrize(
    "arguments",
    [
        {"mixing": "paper"},
        {"mixing": tm.Mixing.released(cross_frame_gain=0.5)},
        {"num_prefix_tokens": 2},
        {"mixing": tm.Mixing.paper().plan(CASE.num_frames, CASE.num_tokens)},
    ],
    ids=str,
)
def test_a_change_of_an_argument_changes_the_plan(arguments, inputs, validated):
    usual = call(*inputs)
    assert not torch.equal(call(*inputs, **arguments), usual)
    assert len(validated) == 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"mixing": "unknown"}, ValueError),
        ({"mixing": ["released"]}, ValueError),
        ({"num_prefix_tokens": 99}, ValueError),
        ({"num_prefix_tokens": [1]}, TypeError),
        ({"backend": "unknown"}, ValueError),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_each_time(arguments, error, inputs):
    call(*inputs)
    for _ in range(2):
        with pytest.raises(error):
            call(*inputs, **arguments)


def test_a_number_that_can_change_in_place_is_read_each_time(inputs):
    number = torch.tensor(1)
    one = call(*inputs, num_prefix_tokens=number)
    number.fill_(2)
    assert not torch.equal(call(*inputs, num_prefix_tokens=number), one)


def test_a_request_after_a_call_is_met(inputs, monkeypatch):
    class Backend:
        def __getattr__(self, name):
            return getattr(eager, name)

        def token_mix_attention(self, query, *_):
            return torch.zeros_like(query)

    monkeypatch.setattr(backends, "BACKENDS", {"eager": eager, "zero": Backend()})
    usual = call(*inputs)
    with tm.use_backend("zero"):
        assert not call(*inputs).any()
    monkeypatch.setenv(backends.VARIABLE, "zero")
    assert not call(*inputs).any()
    assert torch.equal(call(*inputs, backend="eager"), usual)
    monkeypatch.delenv(backends.VARIABLE)
    assert torch.equal(call(*inputs), usual)


def test_a_bounded_number_of_calls_is_remembered(inputs, monkeypatch):
    monkeypatch.setattr(functional, "MOST_REMEMBERED", 3)
    sizes = set()
    for gain in range(10):
        call(*inputs, tm.Mixing.released(cross_frame_gain=gain))
        sizes.add(len(functional._remembered))
    assert sizes == {1, 2, 3}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_calls_that_are_traced_or_transformed_are_neither_remembered_nor_served(inputs, validated):
    usual = call(*inputs)
    with FakeTensorMode() as mode:
        call(*map(mode.from_tensor, inputs))
    torch.func.vmap(call)(*(t[:, None] for t in inputs))
    torch.func.grad(lambda q: call(q, *inputs[1:]).sum())(inputs[0])
    torch.jit.trace(lambda q: call(q, *inputs[1:]), inputs[0], check_trace=False)
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        call(forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])
    assert len(validated) == 6
    assert len(functional._remembered) == 1
    assert torch.equal(call(*inputs), usual)
    assert len(validated) == 6


@pytest.fixture
def kernels(device):
    """A backend with operators, and inputs."""
    inputs = [t.detach() for t in CASE.inputs(torch.float32, device)]
    for name, backend in backends.BACKENDS.items():
        plan = CASE.plan_on(device)
        if name != "eager" and not (backend.unavailable() or backend.unsupported(*inputs, plan)):
            return compute(CASE, name), name, inputs
    return pytest.skip("no backend with operators runs here")


def test_a_tensor_that_waits_to_be_negated_is_negated(kernels):
    attention, _, (query, key, value) = kernels
    usual = attention(query, key, value)
    for tensors in ((torch._neg_view(-query), key, value), (query, key, torch._neg_view(-value))):
        assert tensors[0].is_neg() or tensors[2].is_neg()
        assert torch.equal(attention(*tensors), usual)
    leaf, other = (query.clone().requires_grad_() for _ in range(2))
    attention(leaf, key, value).backward(torch._neg_view(-query))
    attention(other, key, value).backward(query)
    assert torch.equal(leaf.grad, other.grad)


def test_a_profiler_sees_the_operators(kernels):
    attention, name, (query, key, value) = kernels
    query.requires_grad_()
    attention(query, key, value)
    with profile() as profiler:
        attention(query, key, value).sum().backward()
    seen = {event.name for event in profiler.events()}
    assert {f"tokenmix_ops::{name}_fwd", f"tokenmix_ops::{name}_bwd"} <= seen
