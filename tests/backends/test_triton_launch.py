"""How kernels are launched: by several threads, on memory that lies anyhow, with Triton's hooks."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from threading import Event, RLock, Thread
from types import SimpleNamespace

import ahead_of_time
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import tokenmix_ops as tm
from tokenmix_ops import ops
from tokenmix_ops.backends import triton
from tokenmix_ops.backends.triton import configs, launch
from tokenmix_ops.backends.triton.layout import Tile
from tokenmix_ops.testing import Case

DEVICE = "cpu" if triton.interpreted() else "cuda"


class SlowToLoad:
    """A kernel that is half loaded while its first launch lasts, as Triton's are."""

    arg_names = ()

    def __init__(self, second_thread):
        self.second_thread = second_thread
        self.entered = Event()
        self.function = None
        self.launched = []

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *_, **__):
        function = self.function
        if not self.entered.is_set():
            self.entered.set()
            assert self.second_thread.wait(60)
            function = self.function = "loaded"
        self.launched.append(function)
        self.second_thread.set()
        return self


class WatchedLock:
    """A lock that tells when a second thread comes to it."""

    def __init__(self, second_thread):
        self.second_thread = second_thread
        self.lock = RLock()
        self.arrivals = 0

    def __enter__(self):
        self.arrivals += 1
        if self.arrivals == 2:
            self.second_thread.set()
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


@pytest.mark.parametrize("shared", [True, False], ids=["one kind", "two kinds of one kernel"])
def test_no_thread_launches_a_kernel_that_another_is_loading(monkeypatch, shared):
    second_thread = Event()
    kernel = SlowToLoad(second_thread)
    monkeypatch.setitem(launch.KERNELS, "slow", kernel)
    monkeypatch.setattr(launch, "_first_launch", WatchedLock(second_thread))
    config, layout = (
        configs.load("sm_90").configs[0],
        SimpleNamespace(head_dim=16, num_keys=16, gains=False, gain_period=0),
    )
    one, other = (launch.Launch("slow", config, layout) for _ in range(2))
    first, second = (Thread(target=run, args=(1,)) for run in (one, one if shared else other))
    first.start()
    assert kernel.entered.wait(60)
    second.start()
    first.join(60)
    second.join(60)
    assert kernel.launched == ["loaded"] * 2
    one(1)
    assert kernel.launched == ["loaded"] * 3


ROWS = ("query", "key", "value", "output_grad", "output")
TABLES = ("key_index", "key_frame", "token_order", "use_start", "uses")
MIXINGS = (tm.Mixing.released(cross_frame_gain=0.8), tm.Mixing.adjacent())


def placed(shape, dtype, offset=0, padding=0, apart=None):
    """A tensor that starts ``offset`` numbers into aligned memory, with ``padding`` numbers between
    its rows; its videos lie ``apart`` if given, which only one video can."""
    padded = (*shape[:-1], shape[-1] + padding)
    strides = list(torch.empty(padded, device="meta").stride())
    memory = torch.zeros(offset + strides[0] * shape[0], dtype=dtype, device=DEVICE)
    assert memory.data_ptr() % 16 == 0
    strides[0] = apart or strides[0]
    return memory.as_strided(shape, strides, offset)


@pytest.fixture
def launches(monkeypatch):
    """What `Launch` objects were called with, by object, instead of launching."""
    called = defaultdict(list)

    def note(self, programs, *arguments):
        called[self].append(arguments)

    monkeypatch.setattr(launch.Launch, "__call__", note)
    return called


def call(mixing, dtype, head_dim, batch=1, places=None):
    """Launches forward and backward on tensors placed as ``places`` says of each."""
    places, case = places or {}, Case(mixing, num_frames=2, num_tokens=4, head_dim=head_dim)
    shape = (batch, 2, 4, 2, head_dim)
    tensors = {name: placed(shape, dtype, **places.get(name, {})) for name in ROWS}
    tensors["lse"] = placed((batch, 2, 2, 4), torch.float32, **places.get("lse", {}))
    for name in TABLES:
        table = getattr(case.plan, name)
        tensors[name] = placed(table.shape, torch.int32, **places.get(name, {})).copy_(table)
    query, key, value, output_grad, output, lse, *tables = (
        tensors[name] for name in (*ROWS, "lse", *TABLES)
    )
    plan = case.plan
    numbers = (*ops.numbers_of(plan, 0.25)[:-2], 0.8, 0.25)
    launch.forward(query, key, value, *tables[:2], *numbers)
    launch.backward(output_grad, query, key, value, output, lse, *tables, *numbers)


def specialisation(launched, arguments):
    """What Triton compiles a kernel for, as it finds it in the arguments of a launch."""
    kernel = launched.kernel
    if not isinstance(kernel, JITFunction):
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return bind(*arguments, **launched.constants)[1]


def assert_aligned(launched, arguments):
    """The layout promises of rows no more than their addresses and strides hold."""
    layout = launched.constants["L"]
    given = dict(zip(launched.kernel.arg_names, arguments, strict=False))
    size = given["query"].itemsize
    rows = [name for name in given if name in ROWS or name.endswith("_grad")]
    steps = [number for name, number in given.items() if name.startswith("stride_")]
    for number in (*(given[name].data_ptr() for name in rows), *(size * step for step in steps)):
        assert number % layout.alignment == 0
    assert size * layout.head_dim % layout.alignment == 0


@pytest.mark.interfaces
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mixing=st.sampled_from(MIXINGS),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    head_dim=st.sampled_from([1, 7, 8, 16, 20, 72]),
    moved=st.sampled_from([*ROWS, "lse", *TABLES]),
    calls=st.lists(
        st.tuples(st.integers(1, 3), st.sampled_from([0, 1, 4, 8]), st.sampled_from([0, 1, 8])),
        min_size=2,
        max_size=5,
    ),
    apart=st.sampled_from([None, 2**31 - 1, 2**31, 2**40]),
)
def test_a_kept_kernel_only_runs_what_triton_would_compile_alike(
    mixing, dtype, head_dim, moved, calls, apart, algorithm, launches
):
    launches.clear()
    for batch, offset, padding in calls:
        place = {"offset": offset, "padding": padding if moved in ROWS[:4] else 0}
        call(mixing, dtype, head_dim, batch, {moved: place})
    call(mixing, dtype, head_dim, 1, {"query": {"apart": apart}, "output_grad": {"apart": apart}})
    assert len(launches) >= 2
    for launched, of_calls in launches.items():
        first, *others = (specialisation(launched, arguments) for arguments in of_calls)
        assert all(other == first for other in others)
        for arguments in of_calls:
            assert_aligned(launched, arguments)


@pytest.mark.parametrize("name", [*ROWS, "lse", *TABLES])
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_another_batch_keeps_the_kernel_and_another_alignment_does_not(
    mixing, name, algorithm, launches
):
    call(mixing, torch.float16, 16)
    usual = set(launches)
    call(mixing, torch.float16, 16, batch=3)
    assert set(launches) == usual
    launches.clear()
    call(mixing, torch.float16, 16, places={name: {"offset": 1}})
    moved = {
        launched
        for launched, (arguments,) in launches.items()
        if any(isinstance(a, torch.Tensor) and a.data_ptr() % 16 for a in arguments)
    }
    assert moved or name in TABLES[2:]
    assert not moved & usual


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What tests/helpers/ahead_of_time.py prints."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(tm.__file__).parent.parent)
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, ahead_of_time.__file__],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.interfaces
def test_hooks_of_triton_are_told_constants_as_json(compiled):
    for row in compiled:
        before, after = row["told"]
        assert before == after
        keys = (index for (index,) in before["constant_keys"])
        constants = dict(zip(keys, before["constant_vals"], strict=True))
        assert constants[row["parameters"].index("L")] == row["layout"]
        if "TILES" in row["parameters"]:
            tiles = constants[row["parameters"].index("TILES")]
            assert [Tile(**tile) for tile in tiles] == [Tile(0, 32, False), Tile(32, 16, True)]


def widths(row):
    """Widths in bits of the accesses to global memory in a kernel's PTX, and how many each has."""
    found = defaultdict(int)
    for vector, bits in re.findall(
        r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[busf](\d+)\b", row["ptx"]
    ):
        found[int(vector or 1) * int(bits)] += 1
    for size in re.findall(
        r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], 0x(\w+)", row["ptx"]
    ):
        found[8 * int(size, 16)] += 1
    return found


@pytest.mark.interfaces
def test_rows_of_a_multiple_of_16_bytes_are_read_and_written_16_bytes_at_once(compiled):
    *aligned, scattered = map(widths, compiled)
    assert [row["layout"]["alignment"] for row in compiled] == [16] * len(aligned) + [2]
    for found in aligned:
        # lse and delta are 32 bits.
        assert set(found) <= {32, 64, 128}
        assert found[128] > 0
    assert scattered[16] > scattered[128]
