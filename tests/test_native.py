"""The kernels' own tests, which know no PyTorch."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SKIPPED = 77


def find(*names):
    """A program beside this Python, where pip installs CMake, or elsewhere."""
    folders = (str(Path(sys.executable).parent), None)
    return next(filter(None, (shutil.which(n, path=f) for f in folders for n in names)), None)


pytestmark = [
    pytest.mark.skipif(find("cmake") is None, reason="CMake was not found"),
    pytest.mark.skipif(
        find(os.environ.get("CXX", "c++"), "g++", "clang++") is None,
        reason="no C++ compiler was found",
    ),
]


def call(*command):
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    output = run.stdout[-8000:] + run.stderr[-8000:]
    if run.returncode == SKIPPED:
        pytest.skip(output.strip())
    assert run.returncode == 0, output


@pytest.fixture(scope="module", autouse=True)
def build():
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "lock", "w") as lock:
        # Several workers of pytest-xdist may come here.
        fcntl.flock(lock, fcntl.LOCK_EX)
        call(find("cmake"), "--preset", "plain")
        call(find("cmake"), "--build", "--preset", "plain")


def test_kernels_pass_their_own_tests():
    call(find("ctest"), "--preset", "plain")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "amx"])
def test_a_thousand_random_problems(isa):
    call(str(ROOT / "build/plain/kernels/cpu/tests/attention_test"), isa, "1000", "1000")
