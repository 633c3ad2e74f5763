"""What only a GPU can show of the Triton kernels: streams, graphs, devices, compilation, sizes."""

import dataclasses
import fcntl
import tempfile
from pathlib import Path

import pytest
import torch
from agreement import (
    assert_agrees,
    assert_case_agrees,
    assert_within,
    compute,
    expected,
    oracle,
    some_output_grad,
)
from forgetting import forget

import tokenmix_ops as tm
from tokenmix_ops import ops
from tokenmix_ops.backends import triton
from tokenmix_ops.backends.triton import launch
from tokenmix_ops.testing import Case, max_error, output_and_gradients

pytestmark = pytest.mark.skipif(
    triton.interpreted() or not torch.cuda.is_available(), reason="needs a CUDA GPU"
)

MIXINGS = (tm.Mixing.released(), tm.Mixing.paper(), tm.Mixing.adjacent())
USUAL = dict(num_frames=8, num_tokens=197, num_heads=12, head_dim=64, layout="packed")


@pytest.fixture
def much_memory():
    """Of the processes that test on this GPU, one at a time gets it."""
    with Path(tempfile.gettempdir(), "tokenmix_ops-much-memory").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def fast(case):
    return compute(case, "triton")


def detached(case, seed=0, device="cuda"):
    """query, key, value, and a gradient of the output."""
    inputs = tuple(t.detach() for t in case.inputs(torch.float16, device, seed))
    return inputs, some_output_grad(inputs[0])


def assert_same(left, right):
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_the_same_call_gives_the_same_bits(mixing, algorithm):
    case = Case(mixing, **USUAL, batch=4)
    inputs, output_grad = detached(case)
    once = output_and_gradients(fast(case), inputs, output_grad)
    for _ in range(20):
        assert_same(output_and_gradients(fast(case), inputs, output_grad), once)


@pytest.mark.interfaces
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_another_batch_size_compiles_nothing(mixing, algorithm):
    def compiled():
        device = torch.cuda.current_device()
        return {name: len(k.device_caches[device][0]) for name, k in launch.KERNELS.items()}

    def run(batch):
        case = Case(mixing, **USUAL, batch=batch)
        output_and_gradients(fast(case), *detached(case))

    run(1)
    known = compiled()
    for batch in (2, 7, 16, 64):
        # Else Triton would not be asked.
        forget(launch)
        run(batch)
        assert compiled() == known


@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
@pytest.mark.parametrize("first", [1, 64])
def test_kernels_kept_from_one_batch_size_are_right_for_another(mixing, first, algorithm):
    case = Case(mixing, **USUAL, batch=64)
    inputs, output_grad = detached(case)
    results = {}
    for batch in (first, 65 - first):
        part = tuple(t[:batch] for t in inputs)
        results[batch] = output_and_gradients(fast(case), part, output_grad[:batch])
    assert_same(results[1], {name: value[:1] for name, value in results[64].items()})


@pytest.mark.parametrize("moved", range(4), ids=["query", "key", "value", "output_grad"])
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_kernels_kept_from_aligned_memory_are_right_for_any(mixing, moved, algorithm):
    case = Case(mixing, batch=2, head_dim=64)
    inputs, output_grad = detached(case)
    aligned = [*inputs, output_grad]
    memory = aligned[moved].new_zeros(aligned[moved].numel() + 1)
    anywhere = list(aligned)
    anywhere[moved] = memory[1:].view_as(aligned[moved]).copy_(aligned[moved])
    assert anywhere[moved].data_ptr() % 16 != 0
    # Rows read number by number lie otherwise in registers, so sums over them round otherwise. The
    # wanted values come from aligned tensors: PyTorch's own backward fails with any others.
    wanted = expected(case, tuple(aligned[:3]), aligned[3])
    for tensors in (aligned, anywhere):
        found = output_and_gradients(fast(case), tuple(tensors[:3]), tensors[3])
        assert_within(wanted, found, aligned[0].dtype)


def test_kernels_run_on_the_current_stream(algorithm):
    case = Case(tm.Mixing.released(), **USUAL, batch=2)
    inputs, output_grad = detached(case)
    wanted = output_and_gradients(fast(case), inputs, output_grad)
    late = [torch.zeros_like(t) for t in (*inputs, output_grad)]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for there, here in zip(late, (*inputs, output_grad), strict=True):
            there.copy_(here)
        found = output_and_gradients(fast(case), tuple(late[:3]), late[3])
    stream.synchronize()
    assert_same(found, wanted)


@pytest.mark.interfaces
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_a_captured_graph_computes_new_inputs(mixing, algorithm):
    case = Case(mixing, **USUAL, batch=2)
    inputs, output_grad = detached(case)
    leaves = [t.clone().requires_grad_() for t in inputs]

    def step():
        output = fast(case)(*leaves)
        return output, *torch.autograd.grad(output, leaves, output_grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    others, _ = detached(case, seed=7)
    with torch.no_grad():
        for leaf, other in zip(leaves, others, strict=True):
            leaf.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    wanted = output_and_gradients(fast(case), others, output_grad)
    assert_same(dict(zip(wanted, captured, strict=True)), wanted)


def test_more_groups_than_a_second_grid_dimension_holds(algorithm):
    case = Case(
        tm.Mixing.released(), batch=16_385, num_frames=2, num_tokens=3, num_heads=4, head_dim=16
    )
    assert case.batch * case.num_heads > 65_535
    inputs, output_grad = detached(case)
    results = output_and_gradients(fast(case), inputs, output_grad)
    for video in (0, 8_192, 16_384):
        part = slice(video, video + 1)
        one = output_and_gradients(fast(case), tuple(t[part] for t in inputs), output_grad[part])
        assert_same(one, {name: value[part] for name, value in results.items()})


def test_tensors_of_more_than_32_bits_of_numbers(algorithm, much_memory):
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    shape = (1332, 8, 197, 16, 64)
    case = Case(tm.Mixing.released(), *shape[:3], num_heads=shape[3], head_dim=shape[4])
    generator = torch.Generator("cuda").manual_seed(0)
    *inputs, output_grad = (
        torch.randn(shape, dtype=torch.float16, device="cuda", generator=generator)
        for _ in range(4)
    )
    assert inputs[0].numel() > 2**31
    results = output_and_gradients(fast(case), tuple(inputs), output_grad)
    for video in (0, 665, 1331):
        part = slice(video, video + 1)
        one = output_and_gradients(fast(case), tuple(t[part] for t in inputs), output_grad[part])
        assert_same(one, {name: value[part] for name, value in results.items()})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_tensors_may_be_on_another_than_the_current_gpu(mixing, algorithm):
    case = Case(mixing)
    with torch.cuda.device(0):
        for device in ("cuda:1", "cuda:0"):
            inputs, output_grad = detached(case, device=device)
            assert_agrees(fast(case), case, inputs, output_grad)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="this GPU has no TF32",
)
def test_tf32_is_used_only_where_pytorch_allows_it(monkeypatch):
    case = Case(tm.Mixing.released(), head_dim=64)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert_case_agrees(fast(case), case, torch.float32, "cuda")
    inputs = tuple(t.detach() for t in case.inputs(torch.float32, "cuda"))
    output_grad = some_output_grad(inputs[0])
    doubles = tuple(t.double() for t in inputs)
    exact = output_and_gradients(oracle(case), doubles, output_grad)
    errors = []
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        found = output_and_gradients(fast(case), inputs, output_grad)
        errors.append({name: max_error(found[name], exact[name]) for name in exact})
    without, allowed = errors
    for name in exact:
        assert 10 * without[name] < allowed[name] < 0.05, name


@pytest.mark.interfaces
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_inductor_changes_no_bit(mixing):
    case = Case(mixing, num_heads=2, head_dim=64)

    def attention(q, k, v):
        return tm.token_mix_attention(q, k, v, mixing=mixing, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True)
    for batch in (2, 3, 5):
        inputs, output_grad = detached(dataclasses.replace(case, batch=batch))
        wanted = output_and_gradients(attention, inputs, output_grad)
        assert_same(output_and_gradients(compiled, inputs, output_grad), wanted)


def bytes_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_the_allocator_sees_nothing_but_results(mixing, algorithm):
    # Every tensor is a multiple of the 512 bytes that the allocator rounds up to.
    case = Case(mixing, batch=2, num_frames=8, num_tokens=64, num_heads=4, head_dim=64)
    inputs, output_grad = detached(case)
    plan = case.plan_on("cuda")
    tables = (plan.key_index, plan.key_frame, plan.token_order, plan.use_start, plan.uses)
    numbers = ops.numbers_of(plan, 0.125)

    def peak_of(function, *arguments):
        function(*arguments)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function(*arguments)
        return results, torch.cuda.max_memory_allocated() - before

    saved, peak = peak_of(launch.forward, *inputs, *tables[:2], *numbers)
    assert peak == bytes_of(*saved)
    arguments = (output_grad, *inputs, *saved, *tables, *numbers)
    gradients, peak = peak_of(launch.backward, *arguments)
    held = algorithm == "resident" and plan.num_full_tokens is not None
    assert peak == bytes_of(*gradients, *([] if held else saved[1:]))
