"""Calls in processes of their own: results in order, and no call can take the caller with it."""

import os
import signal
import subprocess
import sys
from functools import partial

import psutil
import pytest
from waiting import FOR_EVER, stop_clock, wait_until

from tokenmix_ops.video.data import isolation
from tokenmix_ops.video.data.isolation import Failure, in_processes

# As a script that its user forgot to guard, or did not.
SCRIPT = """
import signal, time
from tokenmix_ops.video.data.isolation import in_processes

def act(what):
    while what == "hang":
        time.sleep(600)
    return what
{guard}
    # Who was started in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for result in in_processes(act, [{items}], 1, 600.0):
        print(result, flush=True)
"""


def act(folder, what):
    """Does what its name says, in the process that calls it."""
    if what == "wait":
        wait_until((folder / "leaves").exists)
    elif what.startswith("hang"):
        (folder / what).touch()
        signal.pause()
    elif what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "leave":
        (folder / "leaves").touch()
        os._exit(3)
    return what, os.getpid()


def workers_of(process):
    return [
        child
        for child in process.children(recursive=True)
        if any("spawn_main" in part for part in child.cmdline())
    ]


def start(folder, items, guard='if __name__ == "__main__":'):
    path = folder / "script.py"
    path.write_text(SCRIPT.format(guard=guard, items=items))
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, str(path)], stdout=pipe, stderr=pipe, text=True)


def test_results_come_in_order_though_calls_hang_and_crash(tmp_path, monkeypatch):
    # Two hang at once: nothing else is then at work that the time limit could end.
    hanging = ("hang", "hang too")
    stop_clock(monkeypatch, lambda: all((tmp_path / name).exists() for name in hanging))
    items = ["wait", "a", "crash", "b", "leave", *hanging, "c"]
    results = list(in_processes(partial(act, tmp_path), items, 2, 2.0))
    assert [r[0] for r in results if not isinstance(r, Failure)] == ["wait", "a", "b", "c"]
    failures = {i: r for i, r in zip(items, results, strict=True) if isinstance(r, Failure)}
    reasons = {item: failure.reason for item, failure in failures.items()}
    assert reasons == {
        "crash": "crashed the process reading it (SIGSEGV)",
        "leave": "crashed the process reading it (exit status 3)",
        "hang": "took more than 2 s",
        "hang too": "took more than 2 s",
    }
    assert failures["hang"].seconds == failures["hang too"].seconds == 1000.0
    assert not workers_of(psutil.Process())


def test_no_process_is_left_when_closed_early_and_none_is_made_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "_END_SECONDS", FOR_EVER)
    assert list(in_processes(partial(act, tmp_path), [], 4, 60.0)) == []
    results = in_processes(partial(act, tmp_path), ["a", "hang"], 8, FOR_EVER)
    item, worker = next(results)
    assert item == "a"
    assert worker != os.getpid()
    assert 1 <= len(workers_of(psutil.Process())) <= 2
    results.close()
    assert not workers_of(psutil.Process())


@pytest.fixture
def started(tmp_path):
    """A script that has its first result, and its worker, which hangs in the second call."""
    process = start(tmp_path, "'a', 'hang'")
    assert process.stdout.readline() == "a\n"
    (worker,) = workers_of(psutil.Process(process.pid))
    yield process, worker
    process.kill()


def test_workers_die_with_a_parent_that_is_killed(started):
    process, worker = started
    process.kill()
    process.communicate()
    assert psutil.wait_procs([worker], timeout=FOR_EVER)[1] == []


def test_ctrl_c_ends_all_and_only_the_parent_speaks(started):
    process, worker = started
    # A terminal sends it to every process.
    for each in (worker, psutil.Process(process.pid)):
        each.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=FOR_EVER)
    assert psutil.wait_procs([worker], timeout=FOR_EVER)[1] == []
    assert process.returncode == -signal.SIGINT
    assert err.count("KeyboardInterrupt") == 1


def test_script_without_a_guard_is_told_so(tmp_path):
    process = start(tmp_path, "'a'", guard="if True:")
    out, err = process.communicate(timeout=FOR_EVER)
    assert process.returncode == 1
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: a process for reading videos could not start; ")
    assert '__name__ == "__main__"' in last
