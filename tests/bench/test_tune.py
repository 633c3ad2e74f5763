"""The tuner: its candidates, its trials and processes, its choices, and the file that it writes."""

import inspect
import json
import os
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from interpreter import round_to_nearest_bfloat16

from bench import trials, tune
from bench.trials import RIVALS, Goal, forced, trial, try_all, using
from bench.tune import (
    GOALS,
    KERNELS,
    Tuner,
    candidates,
    choice,
    fewest_programs,
    merged,
    run,
    source,
    spread,
    write,
)
from tokenmix_ops.backends import triton
from tokenmix_ops.backends.triton import configs
from tokenmix_ops.backends.triton.configs import Architecture, Config
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.testing import Case
from tokenmix_ops.timing import EventClock, HostClock

launch = pytest.importorskip("tokenmix_ops.backends.triton.launch")

if triton.interpreted():
    round_to_nearest_bfloat16()

# Later than any test ends.
NEVER = time.monotonic() + 1e6
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CASE = Case(Mixing.released(), batch=2, num_frames=2, num_tokens=10, num_heads=1, head_dim=16)
BEFORE = Architecture(
    "sm_90",
    "guessed",
    (),
    (
        Config("fwd_streamed", 16, 256, None, 64, 64, 4, 2),
        Config("fwd_streamed", 32, 256, None, 32, 32, 4, 1),
        Config("fwd_resident", 16, 64, 256, 64, 64, 4, 2, 4),
        Config("bwd_query", 16, 256, None, 64, 64, 4, 2),
        Config("bwd_key", 16, 256, None, 64, 64, 4, 2),
        Config("bwd_resident", 16, 64, 256, 32, 128, 8, 2),
    ),
)


def goal(kernel, num_keys=256, dtype_bits=16, head_dim=64, cases=(CASE,)):
    return Goal(kernel, dtype_bits, head_dim, num_keys, cases)


def config(kernel, block_m=64, num_keys=256, programs_per_sm=1):
    return Config(kernel, 16, 64, num_keys, block_m, 64, 4, 2, programs_per_sm)


@pytest.mark.parametrize("one", GOALS, ids=str)
def test_every_candidate_would_serve_its_goal(one):
    found = candidates(one)
    assert len(found) == len(set(found)) > 8
    for case in one.cases:
        num_keys = case.plan.num_keys
        assert all(c.fits(one.kernel, one.dtype_bits, case.head_dim, num_keys) for c in found)


def test_goals_cover_the_kernels_and_rivals_come_first():
    assert set(KERNELS) == set(launch.KERNELS) == {one.kernel for one in GOALS}
    for number, one in enumerate(GOALS):
        rivals = [rival for rival, resident in RIVALS.items() if resident == one.kernel]
        assert set(rivals) <= {earlier.kernel for earlier in GOALS[:number]}


def test_only_the_resident_forward_kernel_divides_its_work():
    assert spread(config("bwd_key")) == [config("bwd_key")]
    numbers = [c.programs_per_sm for c in spread(config("fwd_resident"))]
    assert numbers == list(tune.PROGRAMS_PER_SM)


def test_the_choice_weighs_all_cases_alike():
    fast_at_large, fast_at_small = config("fwd_streamed", 64), config("fwd_streamed", 128)
    slow = config("fwd_streamed", 32)
    times = {slow: [4.0, 0.4], fast_at_large: [2.0, 0.4], fast_at_small: [4.0, 0.1]}
    assert choice(times) == [fast_at_small, fast_at_large, slow]


@pytest.mark.parametrize(
    ("won", "fewest"),
    [
        ({12: True, 96: True, 768: True}, 0),
        ({12: False, 96: True, 768: True}, 1),
        ({12: False, 96: False, 192: True, 768: True}, 1),
        ({12: False, 192: False, 768: True}, 2),
        ({12: True, 768: False}, None),
        ({12: False, 768: False}, None),
        ({140: False, 150: True}, None),
    ],
)
def test_how_many_programs_make_the_resident_backward_kernel_pay(won, fewest):
    assert fewest_programs(won, multiprocessors=132) == fewest


def test_an_entry_is_replaced_and_the_most_special_comes_first():
    best = config("fwd_resident", 128, programs_per_sm=8)
    after = merged(BEFORE, goal("fwd_resident"), best)
    assert after.find("fwd_resident", 16, 64, 204) == best
    assert set(BEFORE.configs) - set(after.configs) == {BEFORE.find("fwd_resident", 16, 64, 204)}
    streamed = config("fwd_streamed", 128)
    after = merged(after, goal("fwd_streamed"), streamed)
    assert after.find("fwd_streamed", 16, 64, 204) == streamed
    general = BEFORE.find("fwd_streamed", 16, 64, 584)
    assert after.find("fwd_streamed", 16, 64, 584) == general
    assert len(after.configs) == len(BEFORE.configs) + 1


def test_what_does_not_pay_has_no_entry_that_could_serve():
    larger = merged(BEFORE, goal("fwd_resident", 640), config("fwd_resident", num_keys=640))
    after = merged(larger, goal("fwd_resident"), None)
    assert after.find("fwd_resident", 16, 64, 204) is None
    assert set(BEFORE.configs) - set(after.configs) == {BEFORE.find("fwd_resident", 16, 64, 204)}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_forced_configuration_is_the_one_that_runs(kernel):
    wanted = config(kernel)
    architecture = forced(BEFORE, wanted)
    found = architecture.find(kernel, 16, 64, 204)
    if kernel == "bwd_resident":  # with any number of programs
        assert found == replace(wanted, programs_per_sm=0)
    else:
        assert found == wanted
    if kernel in RIVALS:
        assert architecture.find(RIVALS[kernel], 16, 64, 204) is None


def test_files_are_written_and_read_and_keep_what_was_not_tuned(tmp_path, monkeypatch):
    tuned = merged(BEFORE, goal("fwd_resident"), config("fwd_resident", 128, programs_per_sm=8))
    tuned = replace(tuned, fastest=({"dtype_bits": 16, "head_dim": 64},), source="somewhere")
    path = tmp_path / "sm_90.json"
    path.write_text("old")
    write(path, tuned)
    assert [p.name for p in tmp_path.iterdir()] == ["sm_90.json"]
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs._read.cache_clear()
    try:
        assert configs.load("sm_90") == tuned
    finally:
        configs._read.cache_clear()
    lines = path.read_text().splitlines()
    assert len(lines) == len(tuned.configs) + 6
    for line in lines[4:-2]:
        entry = json.loads(line.strip().rstrip(","))
        assert ("programs_per_sm" in entry) is ("resident" in entry["kernel"])


def test_the_source_says_what_was_measured_and_what_the_rest_is():
    text = source("guessed", [goal("fwd_resident"), goal("bwd_key", None)], "NVIDIA H200")
    assert text.startswith("measured on NVIDIA H200, Triton ")
    assert text.endswith(": fwd_resident 16/64/256, bwd_key 16/64/None; the rest: guessed")
    again = source(text, [goal("bwd_query")], "NVIDIA H200")
    assert again.endswith(": bwd_query 16/64/256; the rest: guessed")


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
    one = goal(kernel)
    assert trial(one, Config(kernel, 16, 64, 256, 32, 32, 4, 1), DEVICE) is None


def test_a_configuration_that_does_not_compile_fails_its_trial():
    why = trial(goal("fwd_streamed"), Config("fwd_streamed", 16, 64, 256, 48, 32, 4, 1), DEVICE)
    assert "power of 2" in why


def test_a_wrong_result_fails_its_trial(monkeypatch):
    real = trials._compute

    def wrong(goal, plan, inputs, output_grad, found):
        real(goal, plan, inputs, output_grad, found)
        found["output"] *= 1.1

    monkeypatch.setattr(trials, "_compute", wrong)
    why = trial(goal("fwd_streamed"), Config("fwd_streamed", 16, 64, 256, 32, 32, 4, 1), DEVICE)
    assert why.startswith("output: ")


def test_a_configuration_that_spills_fails_its_trial(monkeypatch):
    class Spilling:
        """A kernel with what Triton keeps of compiled ones, by device."""

        def __init__(self, kernel):
            self.kernel, self.device_caches = kernel, Caches()

        def __getattr__(self, name):
            return getattr(self.kernel, name)

        def __getitem__(self, grid):
            return self.kernel[grid]

    class Caches(dict):
        def clear(self):
            self[0] = ({"one": SimpleNamespace(n_spills=0), "two": SimpleNamespace(n_spills=7)},)

    monkeypatch.setitem(launch.KERNELS, "bwd_key", Spilling(launch.KERNELS["bwd_key"]))
    why = trial(goal("bwd_key"), Config("bwd_key", 16, 64, 256, 32, 32, 4, 1), DEVICE)
    assert why == "spills 7 registers"


def test_trials_run_in_processes_that_may_die(monkeypatch):
    monkeypatch.setenv("TOKENMIX_TRIAL", "an answer")
    seen = []
    answers = try_all(
        [("TOKENMIX_TRIAL",), ("NO_SUCH_VARIABLE",), (0,)],
        os.getenv,
        2,
        NEVER,
        seen.append,
    )
    # What is no name of a variable raises, and so ends the process.
    assert answers == {
        ("TOKENMIX_TRIAL",): "an answer",
        ("NO_SUCH_VARIABLE",): None,
        (0,): "its process died",
    }
    assert sorted(seen) == [1, 2, 3]


def test_trials_end_in_time(monkeypatch):
    # The first task is begun at 0, waited for from 0.8 on, and given up after that.
    clock = SimpleNamespace(monotonic=iter((0.0, 0.8, 1.0)).__next__)
    monkeypatch.setattr(trials, "time", clock)
    answers = try_all([(600,), (601,)], time.sleep, 1, 1.0, lambda done: None)
    assert answers[600,] == "no time was left to finish it"
    assert answers[601,] == "no time was left to try it"


class MadeUp(Tuner):
    """A tuner whose timings are given, in place of measured."""

    def __init__(self, seconds):
        super().__init__(BEFORE, DEVICE, HostClock())
        self.seconds = seconds

    def times(self, goal, candidates, rounds):
        return {c: [self.seconds(c, case) for case in goal.cases] for c in candidates}


def test_the_fastest_candidate_is_taken():
    slow, fast = config("bwd_key", 64), config("bwd_key", 32)
    tuner = MadeUp(lambda c, case: c.BLOCK_M / 1e3)
    assert "32 × 64, 4 warps, 2 stages: 32.0000 ms" in tuner.tune(goal("bwd_key"), [slow, fast])
    assert tuner.architecture.find("bwd_key", 16, 64, 204) == fast


@pytest.mark.parametrize(("resident", "pays"), [(1.0, True), (3.0, False)])
def test_the_resident_forward_kernel_has_to_beat_the_streamed_one(resident, pays):
    tuner = MadeUp(lambda c, case: resident if c.kernel == "fwd_resident" else 2.0)
    said = tuner.tune(goal("fwd_resident"), [config("fwd_resident")])
    assert ("does not pay" in said) is not pays
    assert (tuner.architecture.find("fwd_resident", 16, 64, 204) is not None) is pays


def test_goals_are_tuned_in_order_until_the_time_is_up(capsys):
    tuner = MadeUp(lambda c, case: 1.0)
    goals = [goal("bwd_key"), goal("bwd_query"), goal("fwd_streamed")]
    able = {one: [config(one.kernel)] for one in goals} | {goals[1]: []}
    kept = []
    done = run(tuner, goals, able, NEVER, lambda d: kept.append(len(d)))
    assert done == [goals[0], goals[2]]
    assert kept == [1, 2]
    said = capsys.readouterr().out
    assert "bwd_query, 16 bits, head_dim 64, at most 256 keys: no candidate is left" in said
    assert run(tuner, goals, able, time.monotonic() - 1, lambda d: None) == []
    assert capsys.readouterr().out.count("the time was up") == 3


def test_the_resident_backward_kernel_is_used_from_where_it_pays(monkeypatch):
    monkeypatch.setattr(tune, "_multiprocessors", lambda device: 132)
    case = replace(CASE, batch=64, num_heads=12)
    tuner = MadeUp(lambda c, case: 1.0 if (c.kernel == "bwd_resident") == (case.batch > 8) else 2.0)
    tuner.tune(goal("bwd_resident", cases=(case,)), [config("bwd_resident")])
    assert tuner.architecture.find("bwd_resident", 16, 64, 204).programs_per_sm == 1


def test_candidates_are_timed_and_the_fastest_backends_noted(monkeypatch):
    clock = EventClock() if DEVICE.type == "cuda" else HostClock()
    tuner = Tuner(launch.architecture(DEVICE), DEVICE, clock)
    one = goal("fwd_streamed", cases=(replace(CASE, num_tokens=5),))
    good = Config("fwd_streamed", 16, 64, 256, 32, 32, 4, 1)
    broken = replace(good, BLOCK_M=48)
    times = tuner.times(one, [good, broken], rounds=2)
    assert list(times) == [good]
    assert times[good][0] > 0
    for beats in (True, False):
        monkeypatch.setattr(tuner, "_beats_eager", lambda case, dtype, answer=beats: answer)
        tuner.fastest([one])
        found = {"dtype_bits": 16, "head_dim": 64} in tuner.architecture.fastest
        assert found is beats


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
