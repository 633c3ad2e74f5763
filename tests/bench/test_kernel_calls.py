"""What a GPU run calls is compiled without a GPU, and found in its cache later."""

import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import candidates, kernel_archive, kernel_calls, operators
from tokenmix_ops import testing
from tokenmix_ops.backends.triton import configs

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

CALLS = kernel_calls.all_calls()


def compile_call(name, folder, run=None):
    told = []
    found = kernel_calls.compile_all(
        {name: run or CALLS[name]}, folder, lambda done, total: told.append((done, total))
    )
    assert told == [(1, 1)]
    return found


def find_compiled():
    """The same call where no compiler is."""
    from triton.backends.nvidia.compiler import CUDABackend

    def refuse(*_):
        raise AssertionError("compiled again")

    CUDABackend.add_stages = refuse
    CALLS["host"]()


@pytest.mark.interfaces
def test_a_call_finds_the_kernels_of_another_process_wherever_they_are_carried(tmp_path):
    kernels, failed = compile_call("host", tmp_path / "here")
    assert failed == {}
    codes = {path.name for path in (tmp_path / "here").glob("*/*.cubin")}
    assert len(kernels) == len(codes) == 3, codes
    facts = {"architecture": "sm_90", "commit": "1234567", "date": "2026-01-01"}
    kernel_archive.pack(tmp_path / "here", kernels, tmp_path / "archive", facts)
    said = kernel_archive.unpack(tmp_path / "archive", tmp_path / "there")
    assert said.startswith("3 kernels from ")
    assert compile_call("host", tmp_path / "there", find_compiled) == (kernels, {})
    _, failed = compile_call("host", tmp_path / "nowhere", find_compiled)
    assert failed["host"].startswith("AssertionError: compiled again"), failed


def test_everything_that_is_measured_and_tuned_is_called():
    assert next(iter(CALLS)) == "main"
    assert {shape.name for shape in operators.SHAPES} < CALLS.keys()
    assert {"host", "layer, token_mixing", "layer, token_mixing_gain_off"} < CALLS.keys()
    tuned = [name for name in CALLS if "Config(" in name]
    shipped = (configs.load("sm_90"),)
    assert len(tuned) == sum(
        len(candidates.candidates(goal, shipped, candidates.Chip())) for goal in candidates.GOALS
    )
    assert sum(name.startswith("smoke") for name in CALLS) == 12
    tested = [case for case in testing.CASES if case.mixing.kind != "temporal"]
    for case in tested:
        assert f"test, {case}, torch.bfloat16" in CALLS


def test_kernels_of_other_versions_are_refused(monkeypatch):
    pinned = version_of("triton")
    here = {"Python": "3.12", "Triton": pinned}
    monkeypatch.setattr(kernel_calls, "maker", lambda: here)
    assert kernel_calls.refusal() is None
    here["Python"] = "3.13"
    assert kernel_calls.refusal() == (
        f"expected Python 3.12, Triton {pinned}, which the GPU machine has, got Python 3.13, "
        f"Triton {pinned}: run make gpu-cache"
    )


def version_of(name):
    return re.search(rf"^{name}==(\S+)$", kernel_calls.PINS.read_text(), re.MULTILINE)[1]


@pytest.mark.skipif(Path(sys.prefix).name != ".venv-gpu", reason="is about .venv-gpu")
def test_the_environment_for_gpu_versions_has_what_its_pins_say():
    pins = re.findall(r"^(\S+)==(\S+)$", kernel_calls.PINS.read_text(), re.MULTILINE)
    assert {name: version(name) for name, _ in pins} == dict(pins)
    assert find_spec("av") is None
