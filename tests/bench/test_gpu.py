"""The GPU benchmark, as far as it goes without one: contenders, floors, races, tables, commands."""

import inspect
import json
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tokenmix_ops as tm
from tokenmix_ops.bench import gpu, gpu_table, measure, operator_suite, passes, render, tune
from tokenmix_ops.bench.attention import SELECTED, TITLES, contenders
from tokenmix_ops.bench.floor import (
    Ceilings,
    backward_work,
    floor,
    forward_work,
    measured_ceilings,
    works,
)
from tokenmix_ops.bench.host_overhead import host_rows
from tokenmix_ops.bench.measure import HostClock, time_in_turn
from tokenmix_ops.bench.operator_suite import ADJACENT, OFF, Shape, operator_rows
from tokenmix_ops.bench.passes import PASSES, Contender, failure, fault, race, relative_errors
from tokenmix_ops.bench.whole_layer import layer_rows
from tokenmix_ops.reference import token_mix_attention_ref
from tokenmix_ops.testing import Case, output_and_gradients

# Where there is a GPU, the Triton backend runs there alone, and flash attention too.
ON_GPU = torch.cuda.is_available()
TINY = Case(tm.Mixing.released(), batch=2, num_frames=4, num_tokens=18, num_heads=2, head_dim=16)
MIXINGS = (TINY.mixing, OFF, ADJACENT, tm.Mixing.adjacent((1, -1), cross_frame_gain=0.7))
GPU_ONLY = ("sdpa_cudnn", "sdpa_efficient", "cudnn_selected", "xformers", "flash_attn")


@pytest.mark.parametrize("name", TITLES)
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_contenders_compute_the_oracle(mixing, name):
    case = replace(TINY, mixing=mixing)
    device = "cuda" if ON_GPU and name.startswith("triton") else "cpu"
    plan = case.plan_on(device)
    call = contenders(plan, compiled=False)[name]
    if isinstance(call, str):
        assert name not in ("triton", "eager", "flex", "spatial_sdpa")
        return
    inputs = tuple(t.detach() for t in case.inputs(torch.float32, device))
    expected_plan = (
        replace(case, mixing=tm.Mixing.spatial()).plan if name == "spatial_sdpa" else plan
    )
    doubles = tuple(t.double().cpu() for t in inputs)
    output_grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))

    def oracle(query, key, value):
        on_cpu = replace(expected_plan, **tables(expected_plan))
        return token_mix_attention_ref(query, key, value, on_cpu)

    exact = output_and_gradients(oracle, doubles, output_grad.double())
    if name in SELECTED:
        index = plan.key_index[0]
        inputs = (inputs[0], *(t.flatten(1, 2).index_select(1, index) for t in inputs[1:]))
        for key in ("key gradient", "value gradient"):
            exact[key] = exact[key].flatten(1, 2).index_select(1, index.cpu())
    if name in GPU_ONLY:
        assert failure(lambda: call(*inputs))
        return
    output = {"output": call(*inputs).cpu()}
    assert output["output"].shape == inputs[0].shape
    assert fault(relative_errors(output, exact), torch.float32) is None
    if name != "flex":  # which has no gradient on CPUs
        found = output_and_gradients(call, inputs, output_grad.to(device))
        found = {key: value.cpu() for key, value in found.items()}
        assert fault(relative_errors(found, exact), torch.float32) is None


@pytest.mark.interfaces
@pytest.mark.parametrize("name", ["flex", "xformers", "flash_attn", "sdpa_efficient"])
def test_peers_compute_the_oracle_or_say_why_not(name):
    test_contenders_compute_the_oracle(TINY.mixing, name)


def tables(plan):
    return {name: getattr(plan, name).cpu() for name in ("key_index", "key_frame")}


def test_what_has_no_way_to_compute_a_call_says_so():
    with_gain, without = (contenders(replace(TINY, mixing=m).plan) for m in MIXINGS[:2])
    assert list(with_gain) == list(without) == list(TITLES)
    for name in ("sdpa_flash", "sdpa_cudnn", "cudnn_selected", "xformers"):
        assert with_gain[name] == "has no way to apply the gain"
    assert callable(without["sdpa_cudnn"])
    per_frame = contenders(replace(TINY, mixing=ADJACENT).plan)
    assert per_frame["triton_selected"] == "frames share no key set"
    assert per_frame["naive_gather"] == "published for the released mixing only"


SMALL = Case(tm.Mixing.released(), batch=1, num_frames=2, num_tokens=3, num_heads=1, head_dim=4)


def test_work_by_hand():
    # Six queries, four keys ([CLS] of both frames, then two patches), four numbers of two bytes.
    forward, backward = (of(SMALL, SMALL.plan, 2) for of in (forward_work, backward_work))
    assert forward.flops == 2 * (2 * 6 * 4 * 4)
    assert forward.bytes == 8 * (6 + 4 + 4 + 6)
    assert forward.exponentials == 6 * 4
    assert backward.flops == 5 * (2 * 6 * 4 * 4)
    assert backward.bytes == 8 * (6 + 6 + 6 + 4 + 4) + 4 * 6 + 8 * (6 + 6 + 6)
    assert backward.exponentials == 6 * 4
    assert works(SMALL, SMALL.plan, 2)["forward + backward"] == (forward, backward)


def test_the_floor_is_the_largest_of_three_times():
    work = forward_work(SMALL, SMALL.plan, 2)
    assert floor(work, Ceilings(flops=384, bytes=1000, exponentials=1000)) == 1.0
    assert floor(work, Ceilings(flops=1000, bytes=80, exponentials=1000)) == 2.0
    assert floor(work, Ceilings(flops=1000, bytes=1000, exponentials=6)) == 4.0


def test_the_main_shape_has_the_work_that_the_targets_assume():
    main = operator_suite.MAIN
    work = forward_work(main, main.plan, 2)
    assert work.flops == pytest.approx(63e9, rel=0.01)
    assert work.exponentials == pytest.approx(247e6, rel=0.01)
    rates = Ceilings(790e12, 4.3e12, 3.9e12)
    assert floor(work, rates) == pytest.approx(0.08e-3, rel=0.05)


def test_ceilings_are_measured():
    rates = measured_ceilings((torch.float32,), HostClock(), "cpu", size=64)[torch.float32]
    assert min(rates.flops, rates.bytes, rates.exponentials) > 0


class Script:
    """A clock that notes what happens, and by which each moment is a second after the last."""

    def __init__(self):
        self.notes, self.now = [], 0

    def lead(self):
        self.notes.append("lead")

    def mark(self):
        self.now += 1
        return self.now

    def wait(self):
        self.notes.append("wait")

    def seconds(self, start, stop):
        return float(stop - start)


def test_all_make_ready_before_any_runs_and_neighbours_get_other_inputs():
    clock = Script()

    def turn(name):
        def ready(number):
            clock.notes.append(f"{name} ready {number}")
            return lambda: clock.notes.append(f"{name} runs {number}")

        return ready

    timings = time_in_turn({"a": turn("a"), "b": turn("b")}, 2, clock)
    first = ["a ready 0", "b ready 1", "lead", "a runs 0", "lead", "b runs 1", "wait"]
    assert clock.notes[:7] == first
    assert clock.notes[7:9] == ["a ready 1", "b ready 2"]
    assert timings == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def contender(call):
    sets = [(torch.randn(3, 4),) for _ in range(2)]
    return Contender(call, sets, [torch.randn(3, 4) for _ in sets])


@pytest.mark.parametrize("of_pass", PASSES)
def test_a_race_leaves_out_what_fails_and_says_why(of_pass, monkeypatch):
    monkeypatch.setattr(passes, "FEWEST_ROUNDS", 3)

    def hungry(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    def moody(x):
        raise NotImplementedError("not for\nthis")

    racers = {"hungry": hungry, "double": lambda x: 2 * x, "moody": moody}
    found = race({name: contender(call) for name, call in racers.items()}, of_pass, Script(), 0.0)
    assert found.timings == {"double": [1.0, 1.0, 1.0]}
    reasons = {"hungry": "out of memory", "moody": "NotImplementedError: not for"}
    assert found.reasons == reasons


def test_a_race_without_room_for_all_leaves_out_the_hungriest(monkeypatch):
    calls = []

    def warm_up(ready, clock, extra_bytes, name):
        extra_bytes[name] = len(name)

    def last(x):
        calls.append(x)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    monkeypatch.setattr(passes, "_warm_up", warm_up)
    racers = {"ab": lambda x: x, "abc": lambda x: x, "a": last}
    found = race({name: contender(c) for name, c in racers.items()}, "forward", Script(), 0.0)
    assert list(found.timings) == ["ab", "a"]
    assert found.reasons == {"abc": "beside the others: out of memory"}


def test_a_backward_pass_includes_the_parameters():
    layer = torch.nn.Linear(4, 4)
    inputs = contender(layer)
    ready = passes.turn(replace(inputs, parameters=tuple(layer.parameters())), "backward")
    assert [tuple(g.shape) for g in ready(0)()] == [(3, 4), (4, 4), (4,)]
    assert layer.weight.grad is None


def test_failures_are_one_line_with_what_was_warned_of():
    def refuse():
        import warnings

        warnings.warn("heads are too wide\nsecond line", stacklevel=1)
        raise RuntimeError("No available kernel.\nAborting.")

    assert failure(refuse) == "RuntimeError: No available kernel.; heads are too wide"
    assert failure(lambda: None) is None


def test_errors_too_large_or_nan_are_faults():
    exact = {"output": torch.ones(4, dtype=torch.float64)}
    assert relative_errors({"output": torch.full((4,), 1.5)}, exact) == {"output": 0.5}
    poisoned = relative_errors({"output": torch.tensor([1.0, float("nan"), 1, 1])}, exact)
    assert "relative error of inf" in fault(poisoned, torch.bfloat16)
    assert fault({"output": 1e-3, "key gradient": 2.9e-2}, torch.bfloat16) is None
    assert "key gradient" in fault({"output": 1e-3, "key gradient": 3.1e-2}, torch.bfloat16)


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(passes, "FEWEST_ROUNDS", 2)
    monkeypatch.setattr(passes, "MOST_ROUNDS", 2)


RATES = Ceilings(1e12, 1e11, 1e10)


def test_a_shape_becomes_rows_and_a_wrong_contender_is_not_timed(hasty, monkeypatch):
    real = contenders(TINY.plan, compiled=False)
    calls = {
        "triton": lambda q, k, v: 1.1 * real["eager"](q, k, v),
        "eager": real["eager"],
        "flex": real["flex"],
        "xformers": "xformers is not installed",
    }
    monkeypatch.setattr(operator_suite, "contenders", lambda plan, compiled: calls)
    shape = Shape("tiny", TINY, torch.float32, selected=True)
    rows = operator_rows(shape, RATES, HostClock(), "cpu", 0.0)
    assert len(rows) == 3 * 4
    by_name = {(row["pass"], row["contender"]): row for row in rows}
    for of_pass in PASSES:
        assert "relative error of 1.0e-01" in by_name[of_pass, "triton"]["reason"]
        assert by_name[of_pass, "xformers"]["reason"] == "xformers is not installed"
        eager = by_name[of_pass, "eager"]
        assert len(eager["rounds_ms"]) == 2
        assert eager["num_keys"] == 4 + 17
        assert max(eager["relative_error"].values()) < 1e-5
    assert "median_ms" in by_name["forward", "flex"]
    assert "backward on CPU" in by_name["backward", "flex"]["reason"]
    json.dumps(rows)


@pytest.mark.skipif(ON_GPU, reason="Triton's interpreter computes this where there is no GPU")
def test_the_triton_backend_is_timed_and_its_bits_compared(hasty, monkeypatch):
    small = replace(TINY, num_tokens=6, num_heads=1)
    calls = {"triton": contenders(small.plan)["triton"]}
    monkeypatch.setattr(operator_suite, "contenders", lambda plan, compiled: calls)
    shape = Shape("tiny", small, torch.float32, passes=("backward",), selected=True)
    (row,) = operator_rows(shape, RATES, HostClock(), "cpu", 0.0)
    assert row["deterministic"] is True
    assert row["median_ms"] > 0


def test_layers_and_host_become_rows(hasty, monkeypatch):
    sizes = {"batch": 2, "num_frames": 4, "num_tokens": 10, "num_heads": 2, "dim": 16}
    rows = layer_rows(HostClock(), "cpu", 0.0, **sizes, dtype=torch.float32, backend="eager")
    assert {row["pass"] for row in rows} == set(PASSES[:2])
    assert {"spatial_sdpa", "naive_gather", "token_mixing"} <= {row["contender"] for row in rows}
    assert all("median_ms" in row for row in rows)
    monkeypatch.setattr("tokenmix_ops.bench.host_overhead.CALLS", 2)
    monkeypatch.setattr("tokenmix_ops.bench.host_overhead.REPEATS", 2)
    rows = host_rows(HostClock(), "cpu", backend="eager")
    assert all(len(row["rounds_us"]) == 2 for row in rows)


ABOUT = {
    "suite": "gpu",
    "hardware": "NVIDIA H200",
    "driver": "580.1",
    "cuda": "13.0",
    "cudnn": 91000,
    "torch": "2.11.0",
    "triton": "3.6.0",
    "tokenmix_ops": "0.1.0",
    "commit": "0123456789",
    "date": "2026-11-23",
    "tests": "passed",
}


def made_up(shape, of_pass, contender, rounds, part="operator", **more):
    about = {**ABOUT, "part": part, "shape": shape, "pass": of_pass, "contender": contender}
    sizes = {"batch": 64, "num_frames": 8, "num_tokens": 197, "num_heads": 12, "floor_ms": 0.09}
    timed = {"rounds_ms": rounds, "median_ms": sorted(rounds)[len(rounds) // 2]} if rounds else {}
    return {**about, **sizes, **timed, **more}


@pytest.fixture
def rows():
    layer = {"part": "layer", "shape": "layer, B = 64", "of_pass": "forward + backward"}
    host = {**ABOUT, "part": "host", "pass": "no autograd", "contender": "triton"}
    ceiling = {"dtype": "bfloat16", "tflops": 780.0, "terabytes_per_s": 4.3}
    return [
        {**ABOUT, "part": "ceilings", **ceiling},
        made_up("main", "forward", "triton", [0.1, 0.1, 0.1], extra_mb=4.84),
        made_up("main", "forward", "naive_gather", [2.0, 2.2, 1.8]),
        made_up("main", "forward", "flex", [0.14, 0.14, 0.14]),
        made_up("main", "forward", "sdpa_cudnn", [], reason="has no way to apply the gain"),
        made_up("main", "backward", "triton", [0.3, 0.3, 0.3], deterministic=True, extra_mb=155.0),
        made_up("main, gain off", "forward", "triton", [0.1, 0.1, 0.1]),
        made_up("main, gain off", "forward", "sdpa_flash", [0.3, 0.3, 0.3]),
        made_up("main, gain off", "forward", "sdpa_cudnn", [0.2, 0.2, 0.2]),
        made_up(**layer, contender="token_mixing", rounds=[1.0, 1.0, 1.0]),
        made_up(**layer, contender="spatial_sdpa", rounds=[1.6, 1.6, 1.6]),
        {**host, "median_us": 12.5},
    ]


def test_the_table_names_what_is_met_and_what_is_short(rows):
    table = gpu_table.gpu_table(rows)
    for line in (
        "| forward against the naive gather | 20.00× (18.00–22.00) | ≥ 15× | met |",
        "| forward against gather + FlexAttention | 1.40× (1.40–1.40) | ≥ 1.5× | short |",
        "| forward against gather + the best SDPA backend, gain off | 2.00× (2.00–2.00, cuDNN) | "
        "≥ 1.5× | met |",
        "| forward, fraction of the floor | 90% | ≥ 60% | met |",
        "| backward, fraction of the floor | 30% | ≥ 50% | short |",
        "| memory of a forward pass beyond inputs and results | 4.8 MB | a float32 for each query "
        "| met |",
        "| memory of a backward pass beyond inputs and results | 155.0 MB | a float32 for each "
        "query | short |",
        "| backward, twice over the same inputs | the same bits twice | the same bits | met |",
        "| host, one call without autograd | 12.5 µs | ≤ 15 µs | met |",
        "| main | forward | 0.1 | 90% |  | 20.00× |  | 1.40× |  |",
        "- Not run: gather + SDPA, cuDNN (main): has no way to apply the gain",
    ):
        assert line in table.splitlines()
    assert "1.60× (1.60–1.60) | ≥ 1.5× | met" in table
    assert "| adjacent: forward against gather + the best SDPA backend | not measured |" in table
    assert "780 TFLOP/s in bfloat16" in table
    assert "NVIDIA H200, driver 580.1, CUDA 13.0" in table


def test_the_block_of_a_gpu_is_rendered_when_it_was_measured(rows, tmp_path):
    text = "<!-- rendered: gpu-h200 -->\n<!-- end of rendered -->\n"
    assert "Not measured." in render.rendered(text, tmp_path)
    render.write_rows(tmp_path / "gpu-h200.jsonl", rows)
    assert "| forward against the naive gather | 20.00×" in render.rendered(text, tmp_path)


def test_the_picture_is_drawn(rows, tmp_path):
    pytest.importorskip("matplotlib")
    gpu_table.draw(rows, tmp_path / "gpu-h200.png")
    assert (tmp_path / "gpu-h200.png").stat().st_size > 10_000


def test_parts_that_fail_or_come_too_late_are_named(capsys):
    kept = []

    def broken():
        raise ValueError("no such shape\n...")

    parts = [("one", lambda: [{"a": 1}]), ("two", broken), ("three", lambda: [{"a": 3}])]
    left_out = gpu.measure(parts, 1e6, kept.append)
    assert kept == [[{"a": 1}], [{"a": 3}]]
    assert left_out == ["two: ValueError: no such shape ..."]
    assert gpu.measure(parts, -1, kept.append) == [
        f"{name}: the time was up" for name in ("one", "two", "three")
    ]


def test_every_shape_with_a_target_is_measured():
    ceilings = {dtype: RATES for dtype in gpu.DTYPES}
    named = [name for name, _ in gpu.parts(ceilings, HostClock(), "cuda")]
    assert len(named) == len(set(named)) == len(operator_suite.SHAPES) + 3
    assert named[0] == "main"
    for name in ("main, gain off", "adjacent", "S = 577, gain off", "layer, B = 64"):
        assert name in named


@pytest.mark.parametrize(("body", "green"), [("assert True", True), ("assert False", False)])
def test_the_tests_run_without_the_interpreter_and_their_log_is_kept(
    body, green, tmp_path, monkeypatch, capsys
):
    (tmp_path / "tests").mkdir()
    test = (
        f"import os\ndef test_it():\n    assert 'TRITON_INTERPRET' not in os.environ\n    {body}\n"
    )
    (tmp_path / "tests" / "test_one.py").write_text(test)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.run_tests(tmp_path / "tests.log") is green
    log = (tmp_path / "tests.log").read_text()
    assert ("1 passed" in log) is green
    assert capsys.readouterr().out == log


@pytest.mark.parametrize(
    ("main", "arguments", "name"),
    [(gpu.main, ["--out", "nowhere"], "gpu"), (tune.main, [], "tune")],
)
def test_programs_say_that_they_need_a_gpu(main, arguments, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    needs = "needs a CUDA GPU, and this machine has none"
    assert stopped.value.code == f"tokenmix_ops.bench.{name}: {needs}"


def test_red_tests_stop_the_benchmark(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_tests", lambda log: False)
    with pytest.raises(
        SystemExit, match=r"the tests fail, so nothing is measured; see .*tests.log"
    ):
        gpu.main(["--out", str(tmp_path)])


def test_rows_of_a_gpu_carry_its_name_and_versions(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, total_memory=2**37)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def run(command, **options):
        if command[0] == "nvidia-smi":
            return SimpleNamespace(stdout="580.159.04\n")
        raise OSError("no git here")

    monkeypatch.setattr(subprocess, "run", run)
    found = measure.gpu_environment("0123456789")
    wanted = {"hardware": "NVIDIA H200", "driver": "580.159.04", "commit": "0123456789"}
    assert wanted.items() <= found.items()
    assert {"torch", "triton", "cuda", "cudnn", "date", "multiprocessors"} <= found.keys()
    assert measure.gpu_environment()["commit"] == "unknown"


def test_devices_have_short_names():
    assert measure.slug("NVIDIA H200") == "h200"
    assert measure.slug("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"


@pytest.mark.interfaces
def test_a_gpu_can_be_kept_busy_while_work_is_handed_over():
    assert list(inspect.signature(torch.cuda._sleep).parameters) == ["cycles"]
    if ON_GPU:
        measure.EventClock().lead()
