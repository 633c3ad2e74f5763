"""Tests on a GPU are counted, and their failures named."""

import importlib.util
import os
from multiprocessing import get_context

import pytest

from bench import suite
from bench.rows import append_rows, read_rows

BROKEN = "import nothing_of_this_name\n"
TESTS = """
import os, pytest
@pytest.mark.parametrize("number", range(5))
def test_green(number): assert "TRITON_INTERPRET" not in os.environ
def test_red(): raise ValueError("too\\nlong")
@pytest.fixture
def wrong(): assert 1 == 2, "one is not two"
def test_with_it(wrong): pass
def test_left_out(): pytest.skip("no GPU")
"""


def test_counts_and_failures_become_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(suite, "EACH", 10)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text(BROKEN)
    rows, log = tmp_path / "rows", tmp_path / "tests.log"
    told = [str(tmp_path), "--rootdir", str(tmp_path), "--noconftest"]
    told += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    arguments = (told, log, lambda found: append_rows(rows, found), ["xdist"])
    # It changes its process: the folder, the output.
    process = get_context("fork").Process(target=suite.run_tests, args=arguments)
    process.start()
    process.join()
    found = read_rows(rows)
    counts = [row for row in found if "passed" in row]
    assert [row["finished"] for row in counts] == [False, False, True]
    assert counts[-1] == {
        "part": "tests",
        "passed": 5,
        "failed": 3,
        "skipped": 1,
        "finished": True,
        "missing": ["xdist"],
    }
    failures = {row["failure"]: row["why"] for row in found if "failure" in row}
    assert failures == {
        "test_broken.py": "E   ModuleNotFoundError: No module named 'nothing_of_this_name'",
        "test_some.py::test_red": "ValueError: too",
        "test_some.py::test_with_it": "AssertionError: one is not two",
    }
    assert "1 failed, 5 passed, 1 skipped, 2 errors" in log.read_text()


CRASHING = """
import os, pytest
@pytest.mark.parametrize("number", range(12))
def test_green(number): pass
def test_that_ends_its_process(): os._exit(3)
"""


def test_a_test_that_ends_its_worker_is_one_failure(tmp_path, monkeypatch):
    pytest.importorskip("xdist")
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    (tmp_path / "test_some.py").write_text(CRASHING)
    told, _ = suite.arguments([str(tmp_path)], 2)
    rows = tmp_path / "rows"
    told += ["--rootdir", str(tmp_path), "--noconftest"]
    arguments = (told, tmp_path / "tests.log", lambda found: append_rows(rows, found), [])
    process = get_context("fork").Process(target=suite.run_tests, args=arguments)
    process.start()
    process.join()
    *_, counts = read_rows(rows)
    assert counts["finished"]
    assert (counts["passed"], counts["failed"]) == (12, 1)


@pytest.mark.parametrize("gone", ["xdist", "pytest_timeout"])
def test_a_missing_plugin_is_named_and_not_asked_for(gone, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(suite, "find_spec", lambda name: None if name == gone else real(name))
    told, missing = suite.arguments(["tests"], 16)
    assert missing == [gone]
    assert ("-n" in told, "--timeout" in told) == (gone != "xdist", gone != "pytest_timeout")


def test_the_tests_that_are_run_exist():
    assert all(os.path.exists(suite.ROOT / path) for path in suite.TESTS)
    told, _ = suite.arguments(suite.TESTS, 16)
    assert told[:3] == list(suite.TESTS)
