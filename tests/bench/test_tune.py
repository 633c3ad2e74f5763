"""The tuner: its choices, the order of its work, and the file and rows that it leaves."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from interpreter import round_to_nearest_bfloat16

from bench import __main__ as command
from bench import tune
from bench.candidates import GOALS, Chip, Goal
from bench.operators import OFF
from bench.rows import read_rows
from bench.tune import Tuner, choice, fewest_programs, merged, run, settled, source, write
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
        Config("fwd_resident", 16, 64, 256, 64, 64, 4, 2, programs_per_sm=4),
        Config("bwd_query", 16, 256, None, 64, 64, 4, 2),
        Config("bwd_key", 16, 256, None, 64, 64, 4, 2),
        Config("bwd_resident", 16, 64, 256, 32, 128, 8, 2),
    ),
)


def goal(kernel, num_keys=256, dtype_bits=16, head_dim=64, cases=(CASE,)):
    return Goal(kernel, dtype_bits, head_dim, num_keys, cases)


def config(kernel, block_m=64, num_keys=256, programs_per_sm=1):
    return Config(kernel, 16, 64, num_keys, block_m, 64, 4, 2, programs_per_sm=programs_per_sm)


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


class MadeUp(Tuner):
    """A tuner whose timings are given, in place of measured."""

    def __init__(self, seconds):
        super().__init__(BEFORE, DEVICE, HostClock(), lambda row: None)
        self.seconds, self.noted = seconds, []

    def times(self, goal, candidates, rounds):
        return {c: [self.seconds(c, case) for case in goal.cases] for c in candidates}

    def _beats_eager(self, case, dtype):
        self.noted.append(case)
        return True


def test_the_fastest_candidate_is_taken():
    slow, fast = config("bwd_key", 64), config("bwd_key", 32)
    tuner = MadeUp(lambda c, case: c.BLOCK_M / 1e3)
    assert "32 × 64, 4 warps, 2 stages: 32.0000 ms" in tuner.tune(goal("bwd_key"), [slow, fast])
    assert tuner.architecture.find("bwd_key", 16, 64, 204) == fast


def test_the_division_of_the_work_is_chosen_by_all_cases():
    small = replace(CASE, batch=1)
    fast, slow = config("fwd_resident", 64), config("fwd_resident", 128)

    def seconds(c, case):
        if c.kernel != "fwd_resident":
            return 9.0
        if case == small:
            return 1.0 if c.programs_per_sm == 4 else 2.0
        return 1.0 if c.programs_per_sm == 2 else 1.1

    tuner = MadeUp(seconds)
    said = tuner.tune(goal("fwd_resident", cases=(CASE, small)), [slow, fast])
    assert "programs_per_sm 4: 1100.0000, 1000.0000 ms" in said
    assert tuner.architecture.find("fwd_resident", 16, 64, 204).programs_per_sm == 4


@pytest.mark.parametrize(("resident", "pays"), [(1.0, True), (3.0, False)])
def test_the_resident_forward_kernel_has_to_beat_the_streamed_one(resident, pays):
    tuner = MadeUp(lambda c, case: resident if c.kernel == "fwd_resident" else 2.0)
    said = tuner.tune(goal("fwd_resident"), [config("fwd_resident")])
    assert ("does not pay" in said) is not pays
    assert (tuner.architecture.find("fwd_resident", 16, 64, 204) is not None) is pays


@pytest.mark.parametrize(("streamed", "stays"), [(1.5, True), (0.5, False)])
def test_a_streamed_kernel_that_is_tuned_later_may_still_win(streamed, stays):
    better = config("fwd_streamed", 128)
    tuner = MadeUp(
        lambda c, case: {"fwd_resident": 1.0}.get(c.kernel, 2.0 if c != better else streamed)
    )
    tuner.tune(goal("fwd_resident"), [config("fwd_resident")])
    assert tuner.architecture.find("fwd_resident", 16, 64, 204) is not None
    # What serves other calls is no rival.
    tuner.tune(goal("fwd_streamed", None), [config("fwd_streamed", 32, num_keys=None)])
    assert tuner.architecture.find("fwd_resident", 16, 64, 204) is not None
    tuner.tune(goal("fwd_streamed"), [better])
    assert (tuner.architecture.find("fwd_resident", 16, 64, 204) is not None) is stays
    assert tuner.architecture.find("fwd_streamed", 16, 64, 204) == better


def test_the_resident_backward_kernel_is_used_from_where_it_pays(monkeypatch):
    monkeypatch.setattr(tune, "_multiprocessors", lambda device: 132)
    case = replace(CASE, batch=64, num_heads=12)
    pair = config("bwd_query", 32)

    def seconds(c, case):
        if c.kernel == "bwd_resident":
            return 1.0 if case.batch > 8 else 2.0
        return 1.5 if c != pair or case.batch > 16 else 0.9

    tuner = MadeUp(seconds)
    tuner.tune(goal("bwd_resident", cases=(case,)), [config("bwd_resident")])
    assert tuner.architecture.find("bwd_resident", 16, 64, 204).programs_per_sm == 1
    tuner.tune(goal("bwd_query"), [pair])
    assert tuner.architecture.find("bwd_resident", 16, 64, 204).programs_per_sm == 2


def test_goals_are_tuned_in_order_until_the_time_is_up(capsys):
    tuner = MadeUp(lambda c, case: 1.0)
    goals = [goal("bwd_key"), goal("bwd_query"), goal("fwd_streamed")]
    kept, asked = [], []

    def able(one, until):
        asked.append(one)
        # Half of the time that is left is for the timing, and for later goals.
        assert time.monotonic() < until < (time.monotonic() + NEVER) / 2
        return [] if one == goals[1] else [config(one.kernel)]

    done = run(tuner, goals, able, NEVER, lambda d: kept.append((len(d), len(tuner.noted))))
    assert asked == goals
    assert done == [goals[0], goals[2]]
    # After each goal, and once more with what is fastest, as soon as both passes are tuned.
    assert kept == [(1, 0), (2, 0), (2, 2)]
    said = capsys.readouterr().out
    assert "bwd_query, 16 bits, head_dim 64, at most 256 keys: no candidate is left" in said
    assert run(tuner, goals, able, time.monotonic() - 1, lambda d: None) == []
    assert capsys.readouterr().out.count("the time was up") == 3


def test_a_goal_that_cannot_be_timed_changes_nothing():
    tuner = MadeUp(lambda c, case: 1.0)
    tuner.times = lambda goal, candidates, rounds: {}
    kept = []
    assert (
        run(tuner, [goal("bwd_key")], lambda *given: [config("bwd_key")], NEVER, kept.append) == []
    )
    assert kept == []
    assert tuner.architecture == BEFORE
    # A GPU that fails from now on is no reason to prefer the rival.
    real = MadeUp(lambda c, case: 1.0)
    tuner.times = lambda goal, found, rounds: (
        {} if "fwd_streamed" in {c.kernel for c in found} else real.times(goal, found, rounds)
    )
    with pytest.raises(RuntimeError, match="fwd_resident and fwd_streamed ran before"):
        tuner.tune(goal("fwd_resident"), [config("fwd_resident")])
    assert tuner.architecture == BEFORE


def test_what_is_fastest_is_known_after_the_two_kernels_of_the_main_shape():
    reached = {}
    for number in range(1, len(GOALS) + 1):
        if main := settled(GOALS[number - 1], GOALS, GOALS[:number]):
            kind = (main.dtype_bits, main.head_dim)
            reached.setdefault(kind, []).append(number)
            assert main == next(g for g in GOALS if (g.dtype_bits, g.head_dim) == kind)
    # Later goals of the same shape may change it; those of other shapes do not.
    assert reached[16, 64] == [2, 3, 4, 5]
    assert set(reached) == {(g.dtype_bits, g.head_dim) for g in GOALS}
    only = [g for g in GOALS if g.kernel == "fwd_resident"]
    assert settled(only[0], only, only[:1]) == only[0]


@pytest.mark.parametrize("beats", [True, False])
def test_the_fastest_backend_is_noted(monkeypatch, beats):
    tuner = MadeUp(lambda c, case: 1.0)
    other = {"dtype_bits": 32, "head_dim": 64}
    mine = {"dtype_bits": 16, "head_dim": 64}
    tuner.architecture = replace(BEFORE, fastest=(mine, other))
    monkeypatch.setattr(tuner, "_beats_eager", lambda case, dtype: beats or case.mixing == OFF)
    tuner.fastest(goal("fwd_streamed"))
    assert tuner.architecture.fastest == ((other, mine) if beats else (other,))


def test_candidates_are_timed_and_logged():
    clock = EventClock() if DEVICE.type == "cuda" else HostClock()
    rows = []
    tuner = Tuner(launch.architecture(DEVICE), DEVICE, clock, rows.append)
    one = goal("fwd_streamed", cases=(replace(CASE, num_tokens=5),))
    good = Config("fwd_streamed", 16, 64, 256, 32, 32, 4, 1)
    broken = replace(good, BLOCK_M=48)
    times = tuner.times(one, [good, broken], rounds=2)
    assert list(times) == [good]
    assert times[good][0] > 0
    timed, failed = (json.loads(json.dumps(row)) for row in rows)
    assert timed["config"]["BLOCK_M"] == 32
    assert timed["case"]["num_tokens"] == 5
    assert len(timed["rounds_ms"]) == 2
    assert "power of 2" in failed["reason"]


# Tunes goals without end, by a clock that stands still.
ENDLESS = """
import sys
from functools import partial
from pathlib import Path
import torch
from bench import candidates, tune
from bench.operators import MAIN
from bench.rows import append_rows
from tokenmix_ops.backends.triton import configs

class Standing(tune.Tuner):
    def _contender(self, case, dtype, backend):
        pass
    def _time(self, contender, of_pass, rounds, seconds):
        seconds += [1e-3] * rounds

folder = Path(sys.argv[1])
def log(row):
    append_rows(folder / "tune-cpu.jsonl", [row])

tuner = Standing(configs.load("sm_90"), torch.device("cpu"), None, log)
goals = [candidates.Goal("bwd_query", 16, 64, keys, (MAIN,)) for keys in range(256, 100_000)]
def able(goal, until):
    return [configs.Config("bwd_query", 16, 64, goal.num_keys, rows, 64, 4, 2) for rows in (32, 64)]
tune.settled = lambda goal, goals, done: None
keep = tune.keeper(tuner, folder / "sm_90.json", "no GPU")
tune.run(tuner, goals, able, float("inf"), keep)
"""


def test_a_run_that_is_killed_leaves_a_valid_file_and_valid_rows(tmp_path):
    running = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    said = [running.stdout.readline() for _ in range(12)]
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert running.returncode == -signal.SIGKILL, said
    # The goal that was said last may not be written yet.
    found = configs.read(tmp_path / "sm_90.json", "sm_90")
    shipped = configs.load("sm_90").configs
    new = [c.num_keys for c in found.configs if c not in shipped]
    assert len(new) >= 11
    assert new == list(range(256, 256 + len(new)))
    assert f"bwd_query 16/64/{new[-1]}; the rest: " in found.source
    rows = read_rows(tmp_path / "tune-cpu.jsonl")
    # One candidate of a goal to warm up, both roughly, and both thoroughly.
    assert len(rows) >= 5 * len(new)
    assert all(row["median_ms"] == 1 for row in rows)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is none: its package's folder, and what `tune_this_gpu` asks of it."""
    folder = tmp_path / "package"
    folder.mkdir()
    write(folder / "sm_90.json", BEFORE)
    monkeypatch.setattr(configs, "FOLDER", folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(launch, "architecture", lambda device: BEFORE)
    monkeypatch.setattr(tune, "chip_of", lambda device: Chip())
    monkeypatch.setattr(tune, "environment", lambda device, commit: {"commit": commit})
    return folder


class NoPool:
    def __init__(self, processes):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        pass


class AllAble:
    """Trials that everything passes."""

    def __init__(self, pool, candidates, device, log):
        self.candidates = candidates

    def able(self, goal, until):
        return self.candidates[goal]


@pytest.fixture
def made_up(gpu, monkeypatch):
    class Quick(MadeUp):
        def __init__(self, architecture, device, clock, log):
            super().__init__(lambda c, case: c.BLOCK_M / 1e3)
            self.architecture, self.log = architecture, log

        def times(self, goal, candidates, rounds):
            self._log(goal, candidates[0], goal.cases[0], {"median_ms": 1})
            return super().times(goal, candidates, rounds)

        def _rival(self, kernel, goal):
            return config(kernel, 128)

    monkeypatch.setattr(tune, "Tuner", Quick)
    monkeypatch.setattr(tune, "Pool", NoPool)
    monkeypatch.setattr(tune, "Trials", AllAble)
    return gpu


def test_results_get_the_file_and_rows_and_the_package_stays(made_up, tmp_path, capsys):
    before = (made_up / "sm_90.json").read_bytes()
    results = tmp_path / "results"
    arguments = ["tune", "--results", str(results), "--commit", "abc", "--kernels"]
    command.main([*arguments, "bwd_key"])
    assert f"written: {results / 'sm_90.json'}" in capsys.readouterr().out
    assert (made_up / "sm_90.json").read_bytes() == before
    assert sorted(path.name for path in results.iterdir()) == ["sm_90.json", "tune-h200.jsonl"]
    found = configs.read(results / "sm_90.json", "sm_90")
    assert found.find("bwd_key", 16, 64, 204).num_keys == 256
    assert found.source.startswith("measured on NVIDIA H200")
    rows = read_rows(results / "tune-h200.jsonl")
    assert {row["suite"] for row in rows} == {"tune"}
    assert {row["commit"] for row in rows} == {"abc"}
    # A second run continues both.
    command.main([*arguments, "bwd_query"])
    again = configs.read(results / "sm_90.json", "sm_90")
    assert again.find("bwd_key", 16, 64, 204) == found.find("bwd_key", 16, 64, 204)
    assert again.find("bwd_query", 16, 64, 204).num_keys == 256
    assert read_rows(results / "tune-h200.jsonl")[: len(rows)] == rows


def test_without_results_the_package_is_written(made_up, tmp_path):
    command.main(["tune", "--kernels", "bwd_key"])
    found = configs.read(made_up / "sm_90.json", "sm_90")
    assert found.find("bwd_key", 16, 64, 204).num_keys == 256
    assert [path.name for path in made_up.iterdir()] == ["sm_90.json"]


def test_a_package_that_cannot_be_written_is_said_before_the_minutes_are_spent(gpu, monkeypatch):
    monkeypatch.setattr(tune.os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit, match=r"expected to write into .*package; give --results"):
        command.main(["tune"])
