"""What is printed is kept, and shown for as long as somebody reads it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import log
from bench.log import Log

ROOT = Path(log.__file__).parent.parent


@pytest.fixture
def reader(monkeypatch):
    """The end of a pipe of which the other one is the standard output."""
    reading, writing = os.pipe()
    monkeypatch.setattr(log, "STANDARD_OUTPUT", writing)
    with open(reading, "rb", buffering=0) as file:
        yield file
        os.close(writing)


def test_what_processes_print_is_kept_and_shown(tmp_path, reader):
    told = Log(tmp_path / "log")
    told.say("first")
    prints = f"""
import os
from pathlib import Path
from bench.log import print_into
print_into(Path({str(told.path)!r}))
print("second")
os.write(2, b"third\\n")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", prints], cwd=ROOT, check=True)
    told.say("fourth")
    assert told.path.read_text() == "first\nsecond\nthird\nfourth\n"
    assert reader.read(1000) == told.path.read_bytes()


def test_a_reader_who_stops_misses_nothing_and_holds_up_nobody(tmp_path, reader):
    told = Log(tmp_path / "log")
    for number in range(10_000):
        told.say(f"line {number}, of more than a pipe takes")
    whole, read = told.path.read_bytes(), b""
    assert told.shown < len(whole)
    while len(read) < len(whole):
        read += reader.read(1 << 20)
        told.show()
    assert read == whole


def test_a_reader_who_leaves_stops_nothing(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(log, "STANDARD_OUTPUT", writing)
    told = Log(tmp_path / "log")
    told.say("first")
    os.close(writing)
    told.say("second")
    assert told.path.read_text() == "first\nsecond\n"
