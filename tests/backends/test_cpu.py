"""The C++ kernel for CPUs: every instruction set, any number of threads, and what it refuses."""

import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from agreement import assert_agrees, assert_case_agrees, compute, random_cases, some_output_grad
from forgetting import forget
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import tokenmix_ops as tm
from tokenmix_ops import ops
from tokenmix_ops.backends import cpu
from tokenmix_ops.testing import CASES, DTYPES, MIXINGS, Case, output_and_gradients

built = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
OPERATORS = torch.ops.tokenmix_ops


@contextmanager
def forced(isa):
    """Makes the kernel use an instruction set."""
    used, _ = cpu.instruction_sets()
    OPERATORS.cpu_force_isa(isa)
    try:
        yield
    finally:
        OPERATORS.cpu_force_isa(used)


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def isa(request):
    """An instruction set of this processor, in use for one test."""
    if request.param not in cpu.instruction_sets()[1]:
        pytest.skip(f"this processor lacks {request.param}")
    with forced(request.param):
        yield request.param


def assert_all_agree(case, dtype):
    """On every instruction set in turn, because the tolerance takes longer than the kernel."""
    for isa in cpu.instruction_sets()[1]:
        with forced(isa):
            assert_case_agrees(compute(case, "cpu"), case, dtype)


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@built
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_agrees_with_float64(case, dtype):
    assert_all_agree(case, dtype)


@built
@pytest.mark.parametrize("head_dim", [1, 3, 8, 17, 24, 32, 40, 72, 80, 96, 128, 160, 255, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_width_agrees_with_float64(head_dim, dtype):
    case = Case(tm.Mixing.released(), batch=1, num_heads=2, head_dim=head_dim, layout="packed")
    assert_all_agree(case, dtype)


def assert_a_random_case_agrees(case, dtype, scale, isa):
    with forced(isa):
        attention = compute(case, "cpu", scale=scale)
        assert_agrees(attention, case, case.inputs(dtype), scale=scale)


ANY = (
    random_cases(max_head_dim=70),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    st.sampled_from((None, 0.3)),
    st.deferred(lambda: st.sampled_from(cpu.instruction_sets()[1])),
)


@pytest.mark.interfaces
@built
@settings(max_examples=60)
@given(*ANY)
def test_any_mixing_of_any_shape_agrees_with_float64(case, dtype, scale, isa):
    assert_a_random_case_agrees(case, dtype, scale, isa)


@built
@pytest.mark.slow
@settings(max_examples=1000)
@given(*ANY)
def test_a_thousand_shapes_agree_with_float64(case, dtype, scale, isa):
    assert_a_random_case_agrees(case, dtype, scale, isa)


@built
@pytest.mark.parametrize("gain", [1.0, 0.7], ids=["no gain", "gain"])
@pytest.mark.parametrize("size", [1e5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits_choose_the_largest(dtype, size, gain, isa):
    # Where the rounding of a logit alone is worth more than an exponential can hold.
    mixing = tm.Mixing.joint(cross_frame_gain=gain)
    case = Case(mixing, batch=1, num_frames=8, num_tokens=99, num_heads=2, head_dim=64)
    query, key, value = (t.detach() for t in case.inputs(dtype))
    inputs = [t.requires_grad_() for t in (query * size, key * size, value)]
    grad = some_output_grad(inputs[0])
    results = output_and_gradients(compute(case, "cpu"), inputs, grad)
    for name, result in results.items():
        assert result.isfinite().all(), name
    wide = [t.detach().double() for t in inputs]
    expected = compute(case, "eager")(*wide)
    assert torch.allclose(results["output"].double(), expected, rtol=1e-2, atol=1e-2)


@built
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(mixing, dtype, isa, threads):
    case = Case(mixing, batch=2, num_heads=3, head_dim=24)
    inputs = case.inputs(dtype)
    results = []
    for count in (1, 2, 4):
        threads(count)
        grad = some_output_grad(inputs[0])
        results.append(output_and_gradients(compute(case, "cpu"), inputs, grad))
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


@built
def test_long_key_sets_give_the_same_bits_on_any_number_of_threads(isa, threads):
    case = Case(tm.Mixing.joint(), batch=1, num_frames=8, num_tokens=99, num_heads=1, head_dim=64)
    inputs = case.inputs(torch.float32)
    grad = some_output_grad(inputs[0])
    threads(1)
    alone = output_and_gradients(compute(case, "cpu"), inputs, grad)
    threads(4)
    together = output_and_gradients(compute(case, "cpu"), inputs, grad)
    for name, value in alone.items():
        assert torch.equal(value, together[name]), name


@built
@settings(max_examples=60)
@given(random_cases())
def test_tokens_that_no_slot_names_get_exactly_zero_gradient(case):
    query, key, value = case.inputs(torch.float32)
    compute(case, "cpu")(query, key, value).square().sum().backward()
    unnamed = torch.ones(case.num_frames * case.num_tokens, dtype=torch.bool)
    unnamed[case.plan.key_index.flatten().long()] = False
    for tensor in (key, value):
        assert tensor.grad.flatten(1, 2)[:, unnamed].eq(0).all()


def operands(case, dtype=torch.float32):
    """The arguments of `cpu_fwd`."""
    plan = case.plan
    inputs = [t.detach() for t in case.inputs(dtype)]
    return [*inputs, plan.key_index, plan.key_frame, *ops.numbers_of(plan, 0.25)]


@built
@pytest.mark.parametrize("keys", [[13], [13, 13]], ids=["one key", "twice"])
def test_lse_is_the_base_2_logarithm_of_the_sum_of_exponentials(keys, isa):
    case = Case(tm.Mixing.from_index(keys, [1] * len(keys), cross_frame_gain=0.5))
    query, key, value, *rest = operands(case)
    _, lse = OPERATORS.cpu_fwd(query, key, value, *rest)
    logits = 0.25 * torch.einsum("btshd,bhd->bhts", query, key[:, 1, 3]).double()
    logits *= torch.tensor([0.5, 1, 0.5, 0.5])[:, None]
    assert torch.allclose(lse.double(), logits / math.log(2) + len(keys) - 1, atol=1e-5)


@built
def test_rows_that_are_not_contiguous_are_copied():
    arguments = operands(Case(tm.Mixing.released()))
    plain = OPERATORS.cpu_fwd(*arguments)
    strided = [t.mT.contiguous().mT for t in arguments[:3]]
    assert strided[0].stride(-1) != 1
    for left, right in zip(plain, OPERATORS.cpu_fwd(*strided, *arguments[3:]), strict=True):
        assert torch.equal(left, right)


def changed(position, value):
    def change(arguments):
        arguments[position] = value(arguments[position])

    return change


def of_head_dim(size):
    def change(arguments):
        arguments[:3] = [t[..., :1].expand(*t.shape[:-1], size).clone() for t in arguments[:3]]

    return change


WRONG = {
    "dtype": (changed(0, torch.Tensor.double), "dtype"),
    "all of another dtype": (
        lambda a: a.__setitem__(slice(0, 3), [t.double() for t in a[:3]]),
        "query must be float32, bfloat16 or float16",
    ),
    "value": (changed(2, lambda t: t[:, :3]), "value must have the shape and dtype of key"),
    "heads": (changed(0, lambda t: t[:, :, :, :2]), "num_heads"),
    "dimensions": (changed(0, lambda t: t[0]), "5 dimensions"),
    "table": (changed(3, torch.Tensor.long), "key_index must be contiguous int32"),
    "row of the table": (changed(4, lambda t: t[:0]), "key_frame must be contiguous int32"),
    "too few rows": (changed(5, lambda _: 1), "key_index must be contiguous int32"),
    "row_dim": (changed(5, lambda _: 3), "row_dim must be None, 1 or 2"),
    "tokens": (changed(6, lambda n: n + 1), "num_tokens"),
    "no head_dim": (of_head_dim(0), "head_dim must be 1 to 256, got 0"),
    "large head_dim": (of_head_dim(257), "head_dim must be 1 to 256, got 257"),
    "huge head_dim": (of_head_dim(4000), "head_dim must be 1 to 256, got 4000"),
    "no key slots": (
        lambda a: a.__setitem__(slice(3, 5), [t[:, :0] for t in a[3:5]]),
        r"at least one key slot, got Int \[1, 0\]",
    ),
    "index too large": (changed(3, lambda t: t.clone().fill_(40)), "0 <= i < 40, got 40"),
    "negative index": (changed(3, lambda t: -1 - t), "0 <= i < 40, got -"),
}


@built
@pytest.mark.parametrize("wrong", WRONG)
def test_operators_check_what_they_are_given(wrong):
    arguments = operands(Case(tm.Mixing.released()))
    change, message = WRONG[wrong]
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        OPERATORS.cpu_fwd(*arguments)


@built
def test_rows_of_queries_that_are_not_there_are_ignored(isa):
    index = torch.arange(4, dtype=torch.int32)[:, None].expand(4, 3).contiguous()
    query, key, value, _, _, _, *numbers = operands(Case(tm.Mixing.released()))
    arguments = [query, key, value, index, index, 1, *numbers]
    expected = OPERATORS.cpu_fwd(*arguments)
    # What the extra rows name does not exist.
    more = torch.cat([index, torch.full((1000, 3), 2**30, dtype=torch.int32)])
    actual = OPERATORS.cpu_fwd(*arguments[:3], more, more, *arguments[5:])
    for left, right in zip(expected, actual, strict=True):
        assert torch.equal(left, right)


OUT_OF_MEMORY = """
import resource, torch
from tokenmix_ops.backends import cpu
assert cpu.unavailable() is None
torch.set_num_threads(2)
x = torch.ones(2, 1, 1, 1, 256)
index = torch.zeros(1, 2**22, dtype=torch.int32)
def call():
    return torch.ops.tokenmix_ops.cpu_fwd(x, x, x, index, index, None, 1, 0, None, 1.0, 1.0)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
call()
"""


@built
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_running_out_of_memory_is_said():
    environment = {**os.environ, "PYTHONPATH": str(Path(tm.__file__).parents[1])}
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the CPU kernel ran out of memory for its working buffers" in done.stderr


@built
def test_the_library_says_what_it_uses_and_what_it_was_built_with():
    used, supported = cpu.instruction_sets()
    assert supported[0] == "portable"
    assert used == supported[-1]
    found = r"uses (.+); built with PyTorch \d+\.\d+\.\d+"
    assert re.fullmatch(found, cpu.description())[1] == cpu.in_words(used)


def test_amx_is_said_to_be_for_bfloat16_alone():
    assert cpu.in_words("amx") == "avx512, and amx for bfloat16"
    assert cpu.in_words("avx512") == "avx512"


@built
def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match=r"expected an instruction set .* got sse9"):
        OPERATORS.cpu_force_isa("sse9")


@built
@pytest.mark.parametrize("supported", [("portable",), ("portable", "avx2")])
def test_without_vectors_that_were_timed_the_kernel_has_to_be_requested(monkeypatch, supported):
    monkeypatch.setattr(cpu, "instruction_sets", lambda: (supported[-1], supported))
    forget(cpu)
    x = torch.ones(1, 2, 5, 1, 8)
    explained = tm.explain(x, x, x, "released")
    monkeypatch.undo()
    forget(cpu)
    if len(supported) > 1:
        assert explained.backend == "cpu"
    else:
        assert explained.backend == "eager"
        reason = "not used: not measured on this processor; request it by name"
        assert explained.others["cpu"] == reason


REFUSALS = {
    "float64": (
        dict(dtype=torch.float64),
        "supports float16, bfloat16 and float32, got torch.float64",
    ),
    "head_dim": (dict(head_dim=257), "head_dim is at most 256, got 257"),
    "device": (dict(device="cuda:0"), "needs tensors on a CPU, got cuda:0"),
}


@built
@pytest.mark.parametrize("wrong", REFUSALS)
def test_what_it_cannot_compute_has_its_reason(wrong):
    changes, reason = REFUSALS[wrong]
    options = dict(dtype=torch.float32, head_dim=64, device="cpu") | changes
    head_dim = options.pop("head_dim")
    with FakeTensorMode():
        inputs = [torch.empty(2, 4, 10, 3, head_dim, **options) for _ in range(3)]
        explanation = tm.explain(*inputs, "released")
    assert explanation.backend != "cpu"
    assert explanation.others["cpu"] == f"not used: {reason}"


@built
def test_it_is_the_default_where_it_has_vectors_of_x86():
    default = "cpu" if len(cpu.instruction_sets()[1]) > 1 else "eager"
    for mixing in MIXINGS:
        case = Case(mixing)
        assert tm.explain(*case.inputs(torch.float32), case.plan).backend == default


@pytest.mark.interfaces
@built
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_needs_nothing_of_ours_unless_asked_to(strict):
    class Layer(torch.nn.Module):
        def __init__(self, backend):
            super().__init__()
            self.backend = backend

        def forward(self, x):
            return tm.token_mix_attention(x, x, x, mixing="released", backend=self.backend)

    x = torch.randn(2, 4, 10, 3, 16)
    for backend, ours in ((None, []), ("cpu", ["tokenmix_ops.cpu_fwd.default"])):
        program = torch.export.export(Layer(backend), (x,), strict=strict)
        targets = [str(node.target) for node in program.graph.nodes]
        assert [name for name in targets if name.startswith("tokenmix_ops.")] == ours
        assert torch.allclose(program.module()(x), Layer(backend)(x), atol=1e-6)


EXPORT = """
import sys, torch, tokenmix_ops as tm
class Layer(torch.nn.Module):
    def forward(self, x):
        return tm.token_mix_attention(x, x, x, mixing="released", backend="cpu")
torch.manual_seed(0)
x = torch.randn(2, 4, 10, 3, 16)
torch.export.save(torch.export.export(Layer(), (x,)), sys.argv[1])
torch.save((x, Layer()(x)), sys.argv[2])
"""
LOAD = """
import sys, torch, tokenmix_ops
x, output = torch.load(sys.argv[2])
assert torch.equal(torch.export.load(sys.argv[1]).module()(x), output)
"""


@built
def test_a_program_that_holds_the_operator_loads_the_library_where_it_runs(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(tm.__file__).parents[1])}
    for code in (EXPORT, LOAD):
        command = [sys.executable, "-c", code, str(tmp_path / "program.pt2"), str(tmp_path / "x")]
        subprocess.run(command, env=environment, check=True)


def test_without_the_library_the_operators_say_why():
    code = (
        "import torch; from tokenmix_ops import ops; from tokenmix_ops.backends import cpu\n"
        "cpu.unavailable = lambda: 'no luck'\n"
        "from tokenmix_ops.testing import Case; import tokenmix_ops as tm\n"
        "case = Case(tm.Mixing.released()); plan = case.plan\n"
        "call = [*case.inputs(torch.float32), plan.key_index, plan.key_frame]\n"
        "torch.ops.tokenmix_ops.cpu_fwd(*call, *ops.numbers_of(plan, 1.0))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tm.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 1
    assert b"RuntimeError: tokenmix_ops::cpu_fwd cannot run: no luck" in done.stderr


LAYOUTS = {
    "sparse": (torch.Tensor.to_sparse, "needs dense tensors, got torch.sparse_coo"),
    "mkldnn": (torch.Tensor.to_mkldnn, "needs dense tensors, got torch._mkldnn"),
    "elsewhere": (lambda t: t.to("meta"), "needs tensors on a CPU, got meta"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_the_library_has_nothing_for_are_refused(layout):
    change, message = LAYOUTS[layout]
    arguments = operands(Case(tm.Mixing.released()))
    arguments[:3] = [change(t) for t in arguments[:3]]
    call = cpu._after_loading("cpu_fwd") if layout == "elsewhere" else OPERATORS.cpu_fwd
    with pytest.raises(RuntimeError, match=message):
        call(*arguments)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder in which the library is looked for."""
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / cpu.LIBRARY.name)
    monkeypatch.setattr(cpu, "REASON", tmp_path / cpu.REASON.name)
    forget(cpu)
    yield tmp_path
    forget(cpu)


def test_a_missing_library_is_explained_by_what_the_installation_left(elsewhere):
    assert cpu.unavailable() == (
        "the native library is not built; install tokenmix_ops with pip, or run make native"
    )
    cpu.REASON.write_text("not built when tokenmix_ops was installed: no luck\n")
    forget(cpu)
    assert cpu.unavailable() == "not built when tokenmix_ops was installed: no luck"
    case = Case(tm.Mixing.released())
    explanation = tm.explain(*case.inputs(torch.float32), case.mixing)
    assert explanation.backend == "eager"
    assert explanation.others["cpu"] == f"not used: {cpu.unavailable()}"
    assert "cpu" not in tm.available_backends()
    with pytest.raises(RuntimeError, match=r"no luck; request '(triton|eager)', which can"):
        compute(case, "cpu")(*case.inputs(torch.float32))


def test_a_library_that_does_not_load_says_why(elsewhere):
    cpu.LIBRARY.write_text("no library")
    assert cpu.unavailable().startswith("the native library does not load: ")
    assert str(cpu.LIBRARY) in cpu.unavailable()
