"""Tasks are done by processes, each of which may die."""

import os
import signal

from bench.forks import in_processes
from bench.rows import append_rows, read_rows


def test_a_process_that_dies_costs_its_task_alone(tmp_path):
    done = tmp_path / "done"

    def work(number):
        if number == 2:
            os._exit(1)
        append_rows(done, [{"number": number}])

    in_processes(work, [(number,) for number in range(5)], 2)
    assert sorted(row["number"] for row in read_rows(done)) == [0, 1, 3, 4]


def test_a_process_that_hangs_is_killed(tmp_path):
    done = tmp_path / "done"

    def work(number):
        while number == 0:
            signal.pause()
        append_rows(done, [{"number": number}])

    # As good as for ever, but for the first.
    in_processes(work, [(1,), (2,)], 2, 600.0)
    in_processes(work, [(0,)], 1, 0.1)
    assert sorted(row["number"] for row in read_rows(done)) == [1, 2]
