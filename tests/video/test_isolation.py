"""Calls in processes of their own: results in order, and no call can take the caller with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tokenmix_ops.video.data.isolation import Failure, in_processes

# As a script that its user forgot to guard, or did not.
SCRIPT = """
import signal, sys
sys.path.insert(0, {folder!r})
from test_isolation import act
from tokenmix_ops.video.data.isolation import in_processes
{guard}
    # Who was started in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for result in in_processes(act, [{items}], 1, 600.0):
        print(result, flush=True)
"""


def act(what):
    """Does what its name says, in the process that calls it."""
    if what == "hang":
        time.sleep(600)
    elif what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "leave":
        os._exit(3)
    elif isinstance(what, float):
        time.sleep(what)
    return what, os.getpid()


def workers_of(process):
    return [
        child
        for child in process.children(recursive=True)
        if any("spawn_main" in part for part in child.cmdline())
    ]


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def start(folder, items, guard='if __name__ == "__main__":'):
    script = SCRIPT.format(folder=str(Path(__file__).parent), guard=guard, items=items)
    path = folder / "script.py"
    path.write_text(script)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, str(path)], stdout=pipe, stderr=pipe, text=True)


def test_results_come_in_order_though_calls_hang_and_crash():
    items = [0.3, "hang", "a", "crash", "b", "leave", "c"]
    results = list(in_processes(act, items, 2, 2.0))
    assert [r[0] for r in results if not isinstance(r, Failure)] == [0.3, "a", "b", "c"]
    failures = {i: r for i, r in zip(items, results, strict=True) if isinstance(r, Failure)}
    reasons = {item: failure.reason for item, failure in failures.items()}
    assert reasons == {
        "hang": "took more than 2 s",
        "crash": "crashed the process that read it (SIGSEGV)",
        "leave": "crashed the process that read it (exit status 3)",
    }
    assert 2.0 <= failures["hang"].seconds < 60.0
    assert not workers_of(psutil.Process())


def test_no_process_is_left_when_closed_early_and_none_is_made_for_nothing():
    assert list(in_processes(act, [], 4, 60.0)) == []
    results = in_processes(act, ["a", 600.0, 600.0], 8, 600.0)
    item, worker = next(results)
    assert item == "a"
    assert worker != os.getpid()
    assert 1 <= len(workers_of(psutil.Process())) <= 3
    results.close()
    assert not workers_of(psutil.Process())


def test_workers_die_with_a_parent_that_is_killed(tmp_path):
    process = start(tmp_path, "'a', 'hang'")
    assert "'a'" in process.stdout.readline()
    workers = workers_of(psutil.Process(process.pid))
    assert len(workers) == 1
    process.kill()
    process.communicate()
    assert psutil.wait_procs(workers, timeout=30)[1] == []


def test_ctrl_c_ends_all_and_only_the_parent_speaks(tmp_path):
    process = start(tmp_path, "'a', 'hang'")
    assert "'a'" in process.stdout.readline()
    workers = workers_of(psutil.Process(process.pid))
    # A terminal sends it to every process.
    for each in (*workers, psutil.Process(process.pid)):
        each.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert process.returncode == -signal.SIGINT
    assert err.count("KeyboardInterrupt") == 1


def test_script_without_a_guard_is_told_so(tmp_path):
    process = start(tmp_path, "'a'", guard="if True:")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: a process to read videos in could not start; ")
    assert '__name__ == "__main__"' in last
