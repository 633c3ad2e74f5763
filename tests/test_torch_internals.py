"""The private names of PyTorch that the core needs mean what it takes them for."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules import module as all_modules

from tokenmix_ops.torch_internals import (
    HOOKS,
    autocast_is_available,
    cached_constant,
    constant,
    follow,
    guarded,
    has_tiles,
    have_tangent,
    in_trace_or_transform,
    in_transform,
    is_batched,
    is_plain_linear,
    parts,
)

pytestmark = pytest.mark.interfaces


def test_a_constant_function_is_marked_as_pytorch_marks_it():
    def plain():
        return 1

    def theirs():
        return 1

    torch.compiler.assume_constant_result(theirs)
    assert vars(constant(plain)) == vars(theirs) != {}


def test_compiled_code_calls_a_constant_function_with_numbers_that_it_made_symbolic():
    seen = []

    @constant
    def rows(number):
        seen.append(type(number))
        return sum(range(number))

    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def function(x):
        return x + rows(guarded(x.shape[0]))

    for size in (3, 5):
        assert torch.equal(function(torch.zeros(size)), torch.full((size,), sum(range(size)) + 0.0))
    assert set(seen) == {int}
    assert guarded(4) == 4


def test_a_cached_constant_is_computed_once_also_by_compiled_code():
    seen = []

    @cached_constant
    def doubled(number):
        seen.append(number)
        return 2 * number

    @torch.compile(backend="eager", fullgraph=True)
    def function(x):
        return x + doubled(3)

    for _ in range(2):
        assert doubled(3) == 6
        assert torch.equal(function(torch.zeros(2)), torch.full((2,), 6.0))
    assert seen == [3]
    doubled.cache_clear()
    assert doubled(3) == 6
    assert seen == [3, 3]
    assert vars(doubled)["_dynamo_marked_constant"]


def test_compiled_code_asks_whether_a_device_has_autocast():
    @torch.compile(backend="eager", fullgraph=True)
    def function(x):
        return x + autocast_is_available(x.device.type)

    assert torch.equal(function(torch.zeros(2)), torch.ones(2))
    assert not autocast_is_available("meta")


def test_transforms_and_traces_are_noticed():
    found = []

    def look(x):
        found.append((in_transform(), in_trace_or_transform(), is_batched(x)))
        return x.sum()

    x = torch.ones(2, 3)
    look(x)
    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    with FakeTensorMode() as mode:
        look(mode.from_tensor(x))
    look(x)
    plain = (False, False, False)
    traced = (False, True, False)
    assert found == [plain, (True, True, True), (True, True, False), traced, plain]


def test_tangents_are_noticed():
    x = torch.ones(2)
    assert not have_tangent(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert not have_tangent(x, x)
        assert have_tangent(x, dual)
    assert not have_tangent(x)


REGISTERED = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


@pytest.mark.parametrize("register", REGISTERED)
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hooked_linear_layer_is_not_plain(register, everywhere):
    layer = nn.Linear(2, 2)
    assert is_plain_linear(layer)
    name = register.replace("register", "register_module") if everywhere else register
    handle = getattr(all_modules if everywhere else layer, name)(lambda *_: None)
    assert not is_plain_linear(layer)
    handle.remove()
    assert is_plain_linear(layer)


def test_another_linear_layer_is_not_plain():
    class Other(nn.Linear):
        pass

    assert not is_plain_linear(Other(2, 2))
    changed = nn.Linear(2, 2)
    changed.forward = lambda x: x
    assert not is_plain_linear(changed)


def test_all_that_a_module_keeps_is_known():
    own = vars(nn.Module())
    hooks = {name for name in own if "hook" in name and "state_dict" not in name}
    assert hooks == set(HOOKS)
    module = nn.BatchNorm1d(2, affine=False)
    module.extra = nn.Linear(1, 1)
    module.register_buffer("unsaved", torch.zeros(1), persistent=False)
    children, parameters, buffers = parts(module)
    assert list(children) == ["extra"]
    assert parameters == {"weight": None, "bias": None}
    assert list(buffers)[-1] == "unsaved"
    other = nn.Module()
    follow(other, module)
    other.register_buffer("unsaved", torch.zeros(1))
    del other.unsaved
    assert vars(other)["_non_persistent_buffers_set"] == set()
    assert vars(module)["_non_persistent_buffers_set"] == {"unsaved"}
    module.register_forward_pre_hook(lambda *_: None)
    assert other._forward_pre_hooks is module._forward_pre_hooks


@pytest.mark.interfaces
def test_tiles_are_those_of_the_processor():
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    # A system may withhold tiles that the processor has.
    assert has_tiles() in (False, "amx_tile" in flags)
