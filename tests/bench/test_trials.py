"""Trials of launch configurations: their halves, their order, and what they find."""

import inspect
import sys
import time
from concurrent.futures import Future
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from interpreter import round_to_nearest_bfloat16

from bench import trials
from bench.candidates import KERNELS, RIVALS, Goal
from bench.trials import Trials, check, compiles, compiling_only, forced, using
from tokenmix_ops.backends import triton
from tokenmix_ops.backends.triton import configs
from tokenmix_ops.backends.triton.configs import Config
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.testing import Case

launch = pytest.importorskip("tokenmix_ops.backends.triton.launch")

if triton.interpreted():
    round_to_nearest_bfloat16()

# Later than any test ends.
NEVER = time.monotonic() + 1e6
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CASE = Case(Mixing.released(), batch=2, num_frames=2, num_tokens=10, num_heads=1, head_dim=16)
SHIPPED = configs.load("sm_90")


def goal(kernel):
    return Goal(kernel, 16, 64, 256, (CASE,))


def config(kernel, block_m=32):
    return Config(kernel, 16, 64, 256, block_m, 32, 4, 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_forced_configuration_is_the_one_that_runs(kernel):
    wanted = replace(config(kernel), programs_per_sm=1)
    architecture = forced(SHIPPED, wanted)
    found = architecture.find(kernel, 16, 64, 204)
    if kernel == "bwd_resident":  # with any number of programs
        assert found == replace(wanted, programs_per_sm=0)
    else:
        assert found == wanted
    if kernel in RIVALS:
        assert architecture.find(RIVALS[kernel], 16, 64, 204) is None


def test_replaced_configurations_hold_inside_the_block_only():
    here = launch.architecture(DEVICE)
    other = replace(here, source="another")
    with using(other):
        assert launch.architecture(DEVICE) is other
        with using(here):
            assert launch.architecture(DEVICE) is here
        assert launch.architecture(DEVICE) is other
    assert launch.architecture(DEVICE) is here
    with pytest.raises(KeyError), using(other):
        raise KeyError
    assert launch.architecture(DEVICE) is here


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_good_configuration_passes_its_trial(kernel):
    for half in (compiles, check):
        assert half(goal(kernel), config(kernel), DEVICE) is None


def test_a_configuration_that_does_not_compile_fails_its_trial():
    why = check(goal("fwd_streamed"), config("fwd_streamed", 48), DEVICE)
    assert "power of 2" in why


def test_a_wrong_result_fails_its_trial(monkeypatch):
    real = trials._compute

    def wrong(goal, plan, inputs, output_grad, found):
        real(goal, plan, inputs, output_grad, found)
        found["output"] *= 1.1

    monkeypatch.setattr(trials, "_compute", wrong)
    why = check(goal("fwd_streamed"), config("fwd_streamed"), DEVICE)
    assert why.startswith("output: ")


@pytest.mark.parametrize(
    ("words", "why"), [((48, 100), None), ((49, 49), "takes 196 bytes of stack, more than 192")]
)
def test_a_few_spills_and_those_of_other_cases_are_left_to_the_timing(monkeypatch, words, why):
    of_cases = iter(words)

    class Spilling:
        """A kernel with what Triton keeps of compiled ones, by device."""

        def __init__(self, kernel):
            self.kernel, self.device_caches = kernel, {"stale": ({0: compiled(99)},)}

        def __getattr__(self, name):
            return getattr(self.kernel, name)

        def __getitem__(self, grid):
            cache = self.device_caches.setdefault(0, ({},))[0]
            cache[len(cache)] = compiled(next(of_cases))
            return self.kernel[grid]

    def compiled(words):
        return SimpleNamespace(n_spills=words)

    monkeypatch.setitem(launch.KERNELS, "bwd_key", Spilling(launch.KERNELS["bwd_key"]))
    one = replace(goal("bwd_key"), cases=(CASE, replace(CASE, num_tokens=11)))
    assert check(one, config("bwd_key"), DEVICE) == why


class Instant:
    """A pool that does its tasks at once, or some of them never."""

    def __init__(self, never=lambda half, config: False):
        self.never, self.asked = never, []

    def submit(self, function, goal, config, device, seconds, urgent=False):
        self.asked.append((function.__name__, goal.kernel, config.BLOCK_M, urgent))
        answer = Future()
        if not self.never(function.__name__, config):
            answer.set_result(function(goal, config, device))
        return answer


def first_half(goal, config, device):
    return "does not compile" if config.BLOCK_M == 32 else None


def second_half(goal, config, device):
    return "is wrong" if config.BLOCK_M == 64 else None


def tried(pool, logged, *kernels):
    candidates = {goal(k): [config(k, rows) for rows in (16, 32, 64, 128)] for k in kernels}
    return Trials(pool, candidates, DEVICE, logged.append, (first_half, second_half))


def test_goals_are_compiled_ahead_and_checked_when_their_turn_comes(capsys):
    pool, logged = Instant(), []
    of_all = tried(pool, logged, "bwd_query", "bwd_key")
    ahead = [
        ("first_half", k, m, False) for k in ("bwd_query", "bwd_key") for m in (16, 32, 64, 128)
    ]
    assert pool.asked == ahead
    able = of_all.able(goal("bwd_query"), NEVER)
    assert [c.BLOCK_M for c in able] == [16, 128]
    # Nothing of the other goal runs on the GPU.
    checks = sorted(pool.asked[len(ahead) :])
    assert checks == [("second_half", "bwd_query", rows, True) for rows in (16, 64, 128)]
    reasons = {row["config"]["BLOCK_M"]: row["reason"] for row in logged}
    assert reasons == {32: "does not compile", 64: "is wrong"}
    assert logged[0]["config"] == asdict(config("bwd_query", 32))
    assert "4 candidates; dropped: 1 × does not compile, 1 × is wrong" in capsys.readouterr().out


def test_what_is_not_tried_in_time_is_dropped_and_taken_back():
    pool, logged = Instant(never=lambda half, config: config.BLOCK_M == 16), []
    of_all = tried(pool, logged, "bwd_key")
    able = of_all.able(goal("bwd_key"), time.monotonic() + 0.05)
    assert [c.BLOCK_M for c in able] == [128]
    assert logged[0]["reason"] == "no time was left for it"
    assert [answer.cancelled() for answer in of_all.compiling[goal("bwd_key")]] == [
        *[True, False, False, False]
    ]


@pytest.mark.interfaces
def test_a_launch_can_compile_alone(monkeypatch):
    runtime = pytest.importorskip("triton.runtime")
    calls = []
    monkeypatch.setattr(
        runtime.JITFunction,
        "run",
        lambda self, *arguments, grid, warmup, **options: calls.append(
            (self, arguments, grid, warmup, options)
        ),
    )
    kernel = runtime.JITFunction(launch.KERNELS["bwd_key"].fn)
    with compiling_only([kernel]):
        kernel[(3,)](1, num_warps=4)
    kernel[(3,)](1, num_warps=4)
    kernel.warmup(1, grid=(3,), num_warps=4)
    run = [(kernel, (1,), (3,), warmup, {"num_warps": 4}) for warmup in (True, False, True)]
    assert calls == run


@pytest.mark.interfaces
def test_triton_keeps_compiled_kernels_where_trials_look():
    runtime, compiler = (
        pytest.importorskip("triton.runtime"),
        sys.modules["triton.compiler.compiler"],
    )
    for kernel in launch.KERNELS.values():
        compiled = runtime.JITFunction(kernel.fn)
        assert compiled.arg_names == kernel.arg_names
        assert compiled.device_caches == {}
    assert "n_spills" in inspect.getsource(compiler.CompiledKernel)
    taken = inspect.signature(compiler.CompiledKernel.__getitem__)
    assert list(taken.parameters) == ["self", "grid"]
    # Words of local memory, as many bytes as the driver says over four.
    driver = pytest.importorskip("triton.backends.nvidia").__path__[0] + "/driver.c"
    with open(driver) as source:
        assert f"n_spills /= {trials.WORD};" in source.read()
