"""The kernels' own tests, which know no PyTorch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def find(*names):
    """A program beside this Python, where pip installs CMake, or elsewhere."""
    beside = str(Path(sys.executable).parent)
    return next(
        filter(None, (shutil.which(n, path=p) for p in (beside, None) for n in names)), None
    )


def call(*command):
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-8000:]


@pytest.mark.skipif(find("cmake") is None, reason="CMake was not found")
@pytest.mark.skipif(
    find(os.environ.get("CXX", "c++"), "g++", "clang++") is None,
    reason="no C++ compiler was found",
)
def test_kernels_pass_their_own_tests():
    call(find("cmake"), "--preset", "plain")
    call(find("cmake"), "--build", "--preset", "plain")
    call(find("ctest"), "--preset", "plain")
