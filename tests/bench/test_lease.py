"""A run on a GPU goes on whatever its stages do, within its time; the whole plan, on a CPU."""

import faulthandler
import json
import os
import signal
import tempfile
import time
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import gpu, lease
from bench.job import LOG
from bench.lease import DONE, MARGIN, PLAN, REHEARSAL, TIME_UP, Lease, Stage, allowance
from bench.rows import append_rows, read_rows

SHARES = st.lists(st.floats(0.1, 1000), min_size=1, max_size=8)
FACTS = {"suite": "gpu", "device": "toy"}


def stages(seconds):
    return [Stage(str(number), share, 0) for number, share in enumerate(seconds)]


@given(SHARES, st.floats(-10, 2000), st.floats(0, 1))
def test_a_run_never_spends_more_than_it_has(shares, seconds, used):
    plan, left = stages(shares), seconds
    for number in range(len(plan)):
        each = allowance(plan[number:], left)
        assert 0 <= each <= max(0, left) * (1 + 1e-9)
        left -= used * each
    assert left >= min(seconds, 0) - 1e-6
    if used == 1:
        assert left <= 1e-6 * max(1, seconds)


@given(SHARES, st.floats(0, 1))
def test_what_a_stage_does_not_use_goes_to_the_later_ones(shares, used):
    plan, left = stages(shares), sum(shares)
    first = allowance(plan, left)
    assert first == pytest.approx(plan[0].seconds)
    left -= used * first
    for number in range(1, len(plan)):
        each = allowance(plan[number:], left)
        assert each >= plan[number].seconds * (1 - 1e-9)
        left -= each


def test_the_plan_fills_the_usual_time_in_its_order():
    names = [stage.name for stage in PLAN]
    assert names == ["facts", "smoke", "main", "tests", "tune", "again", "report"]
    assert sum(stage.seconds for stage in PLAN) + MARGIN == 585
    assert all(stage.least < stage.seconds for stage in PLAN)
    assert {stage.name for stage in (*REHEARSAL, lease.DEVICE, lease.COMPILE)} == set(gpu.STAGES)
    limits = {stage.name: stage.seconds for stage in PLAN}
    assert [limits[name] for name in names[:5]] == [15, 25, 90, 110, 160]


class Toy:
    """Stages of plain functions, in forks of this process, by a clock that jumps."""

    def __init__(self, results, monkeypatch):
        self.results, self.monkeypatch = results, monkeypatch
        self.functions = {"device": self.device, "compile": lambda job: None}
        monkeypatch.setattr(gpu, "STAGES", self.functions)

    @staticmethod
    def device(job):
        job.facts.write_text(json.dumps(FACTS))

    def run(self, *plan, seconds=100.0 + MARGIN, dry=True):
        made = Lease(self.results, seconds, dry=dry, plan=plan)
        made.context = get_context("fork")
        made.run()
        self.rows = read_rows(made.rows)
        return made

    def outcomes(self):
        return {row["stage"]: row["outcome"] for row in self.rows if row["part"] == "stage"}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    return Toy(tmp_path / "results", monkeypatch)


def note(job, **what):
    job.note.write_text(json.dumps(what))


def write(job, **row):
    append_rows(job.rows, [{"stage": job.stage, **row}])


def abort():
    # Else the process says at length that it did.
    faulthandler.disable()
    os.abort()


def hang(job):
    job.hung.touch()
    while True:
        signal.pause()


def test_a_stage_that_dies_costs_itself_alone(toy):
    def aborts(job):
        write(job, part="host", number=1)
        abort()

    def raises(job):
        note(job, part="main")
        raise ValueError("no such\nshape")

    def spoils(job):
        with job.rows.open("a") as file:
            file.write('{"part": "ho')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    toy.functions |= {"a": aborts, "b": raises, "c": spoils, "d": hang}
    toy.functions["e"] = lambda job: write(job, part="host", number=2)
    made = toy.run(*stages_named("abcde"))
    assert toy.outcomes() == {
        "a": "killed by SIGABRT",
        "b": "exit status 1",
        "c": "killed by SIGKILL",
        "d": TIME_UP,
        "e": DONE,
    }
    assert made.left_out == [f"{name}: {toy.outcomes()[name]}" for name in "abcd"]
    assert [row["number"] for row in toy.rows if row["part"] == "host"] == [1, 2]
    assert [row["bytes"] for row in toy.rows if row["part"] == "repair"] == [12]
    during = {row["stage"]: row["during"] for row in toy.rows if row["part"] == "broken"}
    assert during["b"] == {"part": "main", "why": "ValueError: no such shape"}
    assert all("device" in row for row in toy.rows if row["part"] != "host")


def stages_named(names):
    return [Stage(name, 10, 0) for name in names]


def test_a_stage_goes_on_without_what_broke_it(toy):
    def measures(job):
        rows = read_rows(job.rows) if job.rows.exists() else []
        broken = [row["during"]["contender"] for row in rows if row["part"] == "broken"]
        for number, contender in enumerate(("quick", "crashes", "hangs", "right")):
            if contender in broken or any(row.get("contender") == contender for row in rows):
                continue
            note(job, part="main", contender=contender)
            if contender == "crashes":
                abort()
            if contender == "hangs":
                hang(job)
            write(job, part="operator", shape=f"{number}", contender=contender, **{"pass": "any"})

    toy.functions["main"] = measures
    made = toy.run(Stage("main", 90, 5, patience=10, resumes=True))
    assert made.left_out == []
    found = [row["contender"] for row in toy.rows if row["part"] == "operator"]
    assert found == ["quick", "right"]
    broken = [
        (row["during"]["contender"], row["outcome"]) for row in toy.rows if row["part"] == "broken"
    ]
    assert broken == [("crashes", "killed by SIGABRT"), ("hangs", "stalled for 10 s")]


def test_a_stage_without_time_enough_is_skipped_and_its_time_goes_on(toy, capfd):
    toy.functions |= {"a": hang, "b": lambda job: None, "c": lambda job: None}
    short = [Stage("a", 20, 0), Stage("b", 20, 50), Stage("c", 20, 5)]
    made = toy.run(*short, seconds=60 + MARGIN)
    assert made.left_out == [f"a: {TIME_UP}", "b: skipped: 20 s left for it, needs 50 s"]
    assert toy.outcomes()["c"] == DONE
    shown = capfd.readouterr().out
    assert shown.startswith(f"{lease.REHEARSING}\n")
    assert "--- c: at most 40 s of 40 s" in shown


@pytest.mark.parametrize("seconds", [0, -3, 59, float("nan"), float("inf")])
def test_a_run_has_time_for_something(seconds, toy):
    with pytest.raises(RuntimeError, match=f"^expected at least 60 seconds, got {seconds:g}$"):
        Lease(toy.results, seconds).run()
    assert not toy.results.exists()


def test_the_shortest_run_measures_something_even_after_a_slow_start():
    left, started = lease.LEAST - MARGIN - 20, []
    for number, stage in enumerate(PLAN):
        share = allowance(PLAN[number:], left)
        if share >= stage.least:
            started.append(stage.name)
            left -= share
    assert "again" in started


def test_nothing_survives_an_interrupt(toy):
    pids = toy.results.parent / "pids"

    def forks(job):
        child = os.fork()
        if child:
            pids.write_text(f"{os.getpid()} {child}")
        while True:
            signal.pause()

    def interrupt(clock, process, seconds):
        if pids.exists() and len(pids.read_text().split()) == 2:
            raise KeyboardInterrupt
        process.join(0.01)

    toy.functions["a"] = forks
    toy.monkeypatch.setattr(lease.RehearsalClock, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        toy.run(*stages_named("a"))
    log = (toy.results / LOG).read_text()
    assert "interrupted\nrows: " in log
    assert f"python -m bench report --results {toy.results} prints" in log
    for pid in map(int, pids.read_text().split()):
        while alive(pid):
            time.sleep(0.01)


def alive(pid):
    """Whether a process still runs; one that nobody has waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_survives_the_death_of_the_run(toy):
    """Not even if it is killed, and can kill nothing any more."""
    pids = toy.results.parent / "pids"

    def forks(job):
        child = os.fork()
        if child:
            pids.write_text(f"{os.getpid()} {child}")
        while True:
            signal.pause()

    def dies(clock, process, seconds):
        if pids.exists() and len(pids.read_text().split()) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        process.join(0.01)

    toy.functions["a"] = forks
    toy.monkeypatch.setattr(lease.RehearsalClock, "wait", dies)
    # It cannot tidy up.
    toy.monkeypatch.setattr(tempfile, "tempdir", str(toy.results.parent))
    run = get_context("fork").Process(target=toy.run, args=stages_named("a"))
    run.start()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    for pid in map(int, pids.read_text().split()):
        while alive(pid):
            time.sleep(0.01)


def test_a_closed_output_stops_nothing(toy):
    """Of the run and of its stages; all is in the log."""

    def prints(job):
        print("a line of a stage")
        os.write(2, b"a line of what it calls\n")

    def with_closed_output():
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        toy.run(*stages_named("ab"))

    toy.functions |= {"a": prints, "b": prints}
    run = get_context("fork").Process(target=with_closed_output)
    run.start()
    run.join()
    assert run.exitcode == 0
    log = (toy.results / LOG).read_text()
    assert log.count("a line of what it calls\n") == 2
    assert "--- b: done\n" in log
    assert "rehearsal went as planned\n" in log


def test_rows_of_an_earlier_run_are_left_alone(toy):
    toy.results.mkdir()
    earlier = toy.results / "gpu-h100.jsonl"
    earlier.write_text("{}\n")
    for dry in (False, True):
        with pytest.raises(
            RuntimeError, match=r"results with gpu-h100\.jsonl: name another folder"
        ):
            toy.run(dry=dry)
    assert earlier.read_text() == "{}\n"
    assert list(toy.results.iterdir()) == [earlier]


def test_a_rehearsal_replaces_another_one(toy):
    toy.functions["a"] = lambda job: None
    for _ in range(2):
        toy.run(*stages_named("a"))
        assert [row["outcome"] for row in toy.rows] == [DONE]


def test_a_folder_that_cannot_be_written_is_named(toy):
    toy.results.write_text("a file")
    for folder in (toy.results, toy.results / "x"):
        with pytest.raises(RuntimeError, match=f"^cannot write into {folder}: "):
            Lease(folder, 585, dry=True).run()


def test_stages_in_another_folder_write_where_they_were_told(toy, monkeypatch):
    def moves(job):
        os.chdir("/")
        (job.results / "tests.log").write_text("here")

    toy.functions["a"] = moves
    monkeypatch.chdir(toy.results.parent)
    toy.results = Path(toy.results.name)
    assert toy.run(*stages_named("a")).left_out == []
    assert (toy.results / "tests.log").read_text() == "here"


def test_a_machine_without_a_gpu_is_told_so(toy):
    toy.functions["device"] = gpu.look_at_device
    toy.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"^needs a CUDA GPU, and PyTorch "):
        toy.run(dry=False)
    assert [path.name for path in toy.results.iterdir()] == [LOG]


def test_the_whole_plan_runs_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made = Lease(tmp_path, 585, "abc", dry=True, plan=REHEARSAL)
    made.run()
    assert made.left_out == []
    rows = read_rows(made.rows)
    assert {row["commit"] for row in rows} == {"abc"}
    of_part = {part: [row for row in rows if row["part"] == part] for part in PARTS}
    assert [row["stage"] for row in of_part["stage"]] == [stage.name for stage in REHEARSAL]
    outcomes = {row["stage"]: row["outcome"] for row in of_part["stage"]}
    assert all(outcomes[stage.name] in stage.ends for stage in REHEARSAL)
    assert len(of_part["repair"]) == 1
    assert len(of_part["ceilings"]) == 3
    (counts,) = (row for row in of_part["tests"] if "passed" in row)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 1, 1)
    (failed,) = (row for row in of_part["tests"] if "failure" in row)
    assert failed["why"] == "AssertionError: planted: one is not two"
    assert [row["what"] for row in of_part["compiled"]] == ["eager: main"]
    timed = [row for row in rows if "median_ms" in row]
    assert {row["shape"] for row in timed if row["stage"] == "main"} == {"main"}
    shapes = dict.fromkeys(row["shape"] for row in timed if row["stage"] == "again")
    assert list(shapes) == [name for name in gpu.AGAIN if name != gpu.HOST]
    assert all(row["stage"] == "again" for row in of_part["host"])
    names = {"rehearsal-cpu.jsonl", "tests.log", LOG}
    names |= {"rehearsal-cpu.png"} if find_spec("matplotlib") else set()
    if find_spec("triton"):
        names.add("interpreter.json")
        assert [row["tuned"] for row in rows if row["part"] == "launch file"] == [True]
        assert {row["outcome"] for row in of_part["smoke"]} <= {"right", "not shipped"}
        assert {row["tuned"] for row in timed if row["stage"] == "again"} == {True}
        assert {row["launch_file"] for row in timed if row["stage"] == "main"} == {"as shipped"}
    assert {path.name for path in tmp_path.iterdir()} == names


PARTS = (
    *("stage", "repair", "facts", "ceilings", "smoke", "operator", "tests", "layer", "host"),
    "compiled",
)
