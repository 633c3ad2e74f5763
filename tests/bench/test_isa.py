"""A CPU is held to an instruction set, and says if it cannot be."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import isa
from tokenmix_ops.backends import cpu

ROOT = Path(isa.__file__).parents[1]
FORCED = """
import sys
from bench import isa
isa.force(sys.argv[1])
import torch
print(torch.backends.cpu.get_cpu_capability(), isa.used())
"""


@pytest.mark.parametrize("name", isa.VARIABLES)
def test_all_contenders_are_limited_to_it(name):
    if name.upper() not in ("AVX2", torch.backends.cpu.get_cpu_capability()):
        pytest.skip(f"this processor has no {name}")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    done = subprocess.run(
        [sys.executable, "-c", FORCED, name], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [name.upper(), "none" if cpu.unavailable() else name]


def test_what_comes_too_late_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    for variable in isa.VARIABLES["avx2"]:
        monkeypatch.setenv(variable, "")
    with pytest.raises(RuntimeError, match="expected PyTorch to use avx2, got other"):
        isa.force("avx2")


def test_the_instruction_set_is_that_of_the_kernel(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "not built")
    assert isa.used() == "none"
