"""The run over all parts on a GPU, as far as it goes without one."""

import pytest

from bench import gpu, operators
from bench.floor import Ceilings
from tokenmix_ops.timing import HostClock

RATES = Ceilings(1e12, 1e11, 1e10)


def test_every_shape_with_a_target_is_measured():
    ceilings = {dtype: RATES for dtype in gpu.DTYPES}
    named = [name for name, _ in gpu.parts(ceilings, HostClock(), "cuda")]
    assert len(named) == len(set(named)) == len(operators.SHAPES) + 3
    assert named[0] == "main"
    for name in ("main, gain off", "adjacent", "S = 577, gain off", "layer, B = 64"):
        assert name in named


@pytest.mark.parametrize(("body", "green"), [("assert True", True), ("assert False", False)])
def test_the_tests_run_without_the_interpreter_and_their_log_is_kept(
    body, green, tmp_path, monkeypatch, capsys
):
    (tmp_path / "tests").mkdir()
    test = (
        f"import os\ndef test_it():\n    assert 'TRITON_INTERPRET' not in os.environ\n    {body}\n"
    )
    (tmp_path / "tests" / "test_one.py").write_text(test)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.run_tests(tmp_path / "tests.log") is green
    log = (tmp_path / "tests.log").read_text()
    assert ("1 passed" in log) is green
    assert capsys.readouterr().out == log
