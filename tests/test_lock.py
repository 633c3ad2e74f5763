"""The lock holds what pyproject.toml asks for, and leaves to torch what is torch's choice."""

import importlib.util
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytest.importorskip("tomllib", reason="the lock is for Python 3.11 and later")

TOOL = Path(__file__).parents[1] / "tools" / "lock.py"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}


@pytest.fixture(scope="module")
def lock():
    spec = importlib.util.spec_from_file_location("lock", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pins(lock):
    return lock.pins(lock.LOCK.read_text())


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_each_requirement_has_one_pin_within_its_range(python, platform, lock, pins):
    there = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": platform,
        "platform_system": PLATFORMS[platform],
    }

    def in_force(requirement):
        return requirement.marker is None or requirement.marker.evaluate(there)

    for wanted in filter(in_force, lock.declared()):
        name = canonicalize_name(wanted.name)
        if name == "torch":
            continue
        found = [pin for pin in pins if in_force(pin) and pin.name == name]
        hint = f"{wanted} on Python {python}, {platform}: run make lock"
        assert len(found) == 1, hint
        assert wanted.specifier.contains(lock.version_of(found[0])), hint


def test_every_pin_is_exact_and_none_is_of_what_torch_chooses(lock, pins):
    for pin in pins:
        assert [each.operator for each in pin.specifier] == ["=="], pin
        assert pin.url is None
        assert not lock.TORCH_CHOOSES.match(f"{pin.name}=="), pin


def test_the_lock_goes_with_the_torch_that_make_installs(lock):
    header = lock.LOCK.read_text().splitlines()[0]
    (torch,) = re.findall(r"^LOCKED_TORCH := (\S+)$", (lock.ROOT / "Makefile").read_text(), re.M)
    assert f"for {torch}," in header, "run make lock"


def test_a_build_of_torch_outdoes_the_pins_that_it_excludes_and_no_others(lock):
    text = "# A comment.\nfilelock==4.3.1\nsympy==1.14.0 # via torch\ntriton==3.9.0\ntyro==1.0.17\n"
    wanted = ["filelock", "Sympy<1.14", "triton==3.6.0", "tyro==9; extra == 'x'", "nvidia-nccl==2"]
    kept = lock.fit(text, [Requirement(each) for each in wanted])
    assert [str(each) for each in kept] == ["filelock==4.3.1", "tyro==1.0.17"]


def test_the_newest_versions_are_looked_for_past_upper_bounds_alone(lock):
    wanted = Requirement("triton>=3.6,!=3.8,<3.10; platform_system == 'Linux'")
    bare = lock.without_upper_bounds(wanted)
    assert set(str(bare.specifier).split(",")) == {">=3.6", "!=3.8"}
    assert bare.marker == wanted.marker


def test_differences_name_both_versions(lock):
    found = lock.differences("a==2\nb==1\nc==3\n", "a==1\nb==1\nd==1\n")
    assert found == ["a 2, locked: 1", "c 3, locked: none"]
