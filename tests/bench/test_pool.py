"""Processes that may die of their tasks."""

import os
import signal
import subprocess
import sys
import time

from bench import pool as pool_module
from bench.pool import Pool

# The worker holds this program's stdout too, so whoever reads it to the end waits for both.
KILLED = """
import os, signal
from bench.pool import Pool
with Pool(1) as pool:
    print(pool.submit(os.getpid, seconds=600).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_tasks_are_done_in_processes_that_may_die(monkeypatch):
    monkeypatch.setenv("TOKENMIX_TASK", "an answer")
    with Pool(2) as pool:
        # What is no name of a variable raises, and so ends the process.
        names = ("TOKENMIX_TASK", "NO_SUCH_VARIABLE", 0)
        answers = [pool.submit(os.getenv, name, seconds=600) for name in names]
        assert [a.result() for a in answers] == ["an answer", None, "its process died"]


def test_what_takes_too_long_ends_and_others_go_on():
    with Pool(1) as pool:
        hanging = pool.submit(time.sleep, 600, seconds=0.1)
        next_one = pool.submit(os.getenv, "NO_SUCH_VARIABLE", seconds=600)
        assert hanging.result() == "took longer than 0.1 s"
        assert next_one.result() is None


def test_a_machine_without_room_for_a_process_is_answered(monkeypatch):
    def full():
        raise OSError("no room")

    monkeypatch.setattr(pool_module, "_Worker", full)
    with Pool(1) as pool:
        answers = [pool.submit(os.getpid, seconds=600) for _ in range(2)]
        assert [a.result() for a in answers] == ["no process for it: no room"] * 2


def test_urgent_tasks_come_first_and_waiting_ones_can_be_taken_back():
    order = []
    pool = Pool(1)
    answers = {
        name: pool.submit(os.getenv, "NO_SUCH_VARIABLE", seconds=600, urgent=name == "urgent")
        for name in ("first", "taken back", "last", "urgent")
    }
    for name, answer in answers.items():
        answer.add_done_callback(lambda _, name=name: order.append(name))
    assert answers["taken back"].cancel()
    with pool:
        answers["last"].result()
    assert order == ["taken back", "urgent", "first", "last"]


def test_a_pool_that_closes_ends_what_is_at_work():
    with Pool(1) as pool:
        at_work = pool.submit(time.sleep, 600, seconds=600)
        waiting = pool.submit(time.sleep, 600, seconds=600)
        while not at_work.running():
            time.sleep(0.01)
    assert at_work.result() == "its process died"
    assert waiting.cancelled()


def test_processes_end_with_the_one_that_started_them():
    done = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    worker = int(done.stdout)
    try:
        os.kill(worker, 0)
    except ProcessLookupError:
        return
    with open(f"/proc/{worker}/stat") as stat:
        assert stat.read().rpartition(")")[2].split()[0] == "Z"
