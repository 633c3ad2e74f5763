"""Tasks are done by processes, which go without a word when they are interrupted."""

import io
import operator
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import side_by_side

ROOT = Path(side_by_side.__file__).parent.parent
ENDLESS = """
import subprocess
from bench.side_by_side import each
if __name__ == "__main__":
    list(each(subprocess.call, [(("sh", "-c", "echo started; exec sleep 3600"),)] * 8))
"""


def test_every_task_has_its_result():
    assert sorted(side_by_side.each(operator.mul, [(2, 3), (4, 5), (6, 7)])) == [
        (0, 6),
        (1, 20),
        (2, 42),
    ]


def test_an_error_of_a_task_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(side_by_side.each(operator.truediv, [(1, 0)]))


def test_an_interrupt_ends_all_processes_and_only_one_speaks(tmp_path):
    program = tmp_path / "endless.py"
    program.write_text(ENDLESS)
    running = subprocess.Popen(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stdout.readline() == "started\n"
    os.killpg(running.pid, signal.SIGINT)
    _, told = running.communicate()
    assert told.count("Traceback") == 1
    assert told.strip().endswith("KeyboardInterrupt")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_one_line_and_a_log_one_for_each_tenth():
    terminal, log = Terminal(), io.StringIO()
    for file in (terminal, log):
        tell = side_by_side.counter("did {} tasks", file)
        for done in range(1, 41):
            tell(done, 40)
    assert terminal.getvalue().count("\r") == 40
    assert terminal.getvalue().endswith("\rdid 40 of 40 tasks\n")
    assert terminal.getvalue().count("\n") == 1
    assert log.getvalue().splitlines() == [f"did {done} of 40 tasks" for done in range(4, 41, 4)]
