"""The native build: what an installation leaves behind, on a whole machine and a bare one."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

import tokenmix_ops
from tokenmix_ops.backends import cpu

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
LIBRARY, REASON = "tokenmix_ops/lib/libtokenmix_cpu.so", "tokenmix_ops/lib/no_cpu.txt"
WITH_CMAKE = shutil.which("cmake") is not None or importlib.util.find_spec("cmake") is not None

buildable = pytest.mark.skipif(not (COMPILER and WITH_CMAKE), reason="no compiler, or no CMake")


def copied(folder):
    """A copy of the project in which nothing has been built."""
    copy = folder / "project"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, copy)
    unwanted = shutil.ignore_patterns("lib", "__pycache__")
    for name in ("cmake", "kernels", "bindings", "tokenmix_ops"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    return copy


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy whose builds succeed."""
    return copied(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory):
    """A copy whose builds fail: CMake would remember a compiler that works."""
    return copied(tmp_path_factory.mktemp("bare"))


HIDING = """
import runpy, site, sys, sysconfig
hidden = {hidden}
sys.modules.update(dict.fromkeys(hidden))
if "torch" in hidden:
    sysconfig.get_path = lambda name: "/nowhere"
    site.getusersitepackages = lambda: "/nowhere"
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


def set_up(project, *arguments, hidden=(), **environment):
    """Runs setup.py without some packages, with some variables changed."""
    command = [sys.executable, "-c", HIDING.format(hidden=hidden), *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def wheel(project):
    """A wheel made where everything is there."""
    done = set_up(project, "-q", "bdist_wheel", "--dist-dir", "whole")
    assert done.returncode == 0, done.stderr
    (found,) = (project / "whole").iterdir()
    return found


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def facts(wheel):
    """Names of what a wheel holds, and the fields of its WHEEL file."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (name,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        return names, dict(re.findall("(.*?): (.*)", archive.read(name).decode()))


@buildable
def test_where_a_compiler_is_the_library_is_built_and_loads():
    assert cpu.unavailable() is None


@buildable
def test_a_wheel_with_the_library_serves_one_platform_and_every_python(wheel):
    names, fields = facts(wheel)
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", wheel.name)
    assert fields["Root-Is-Purelib"] == "false"
    assert wheel.name.endswith(f"-{fields['Tag']}.whl")
    assert LIBRARY in names
    assert REASON not in names
    assert not any(name.startswith(("kernels", "bindings")) for name in names)


@buildable
def test_the_library_of_a_wheel_computes(unpacked):
    code = (
        "import torch, tokenmix_ops as tm; x = torch.randn(1, 2, 5, 1, 8);"
        "tm.token_mix_attention(x, x, x, mixing='released', backend='cpu');"
        "print(tm.__file__, tm.available_backends())"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-c", code]
    out = subprocess.check_output(command, env=environment, cwd=unpacked, text=True)
    assert out.startswith(str(unpacked))
    assert "'cpu'" in out


@buildable
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_of_pytorch_the_library_needs_the_c_interface_alone(unpacked):
    command = ["nm", "--dynamic", "--undefined-only", str(unpacked / LIBRARY)]
    symbols = re.findall(r" U (\S+)", subprocess.check_output(command, text=True))
    of_torch = [name for name in symbols if re.search("torch|aten|c10|caffe", name, re.I)]
    assert "torch_parallel_for" in of_torch
    assert [name for name in of_torch if not name.startswith(("torch_", "aoti_torch_"))] == []
    assert not any(name.startswith("Py") for name in symbols)


@buildable
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_library_names_no_folder(project, unpacked):
    dynamic = subprocess.check_output(["readelf", "-d", str(unpacked / LIBRARY)], text=True)
    assert "NEEDED" in dynamic
    assert not re.search("RPATH|RUNPATH", dynamic)
    assert bytes(project) not in (unpacked / LIBRARY).read_bytes()


def test_a_source_distribution_holds_what_a_build_needs(project):
    done = set_up(project, "-q", "sdist", "--dist-dir", "source")
    assert done.returncode == 0, done.stderr
    (found,) = (project / "source").iterdir()
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.[ch]*")}
    assert wanted
    assert names >= wanted | {"CMakeLists.txt", "setup.py", "bindings/cpu.cpp"}
    assert not names & {LIBRARY, REASON}


def script(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(params=["no CMake", "no PyTorch", "no compiler", "broken compiler", "silent CMake"])
def lack(request, tmp_path):
    """What is wrong with a machine: arguments of `set_up`, and how the reason begins."""
    if request.param in ("no compiler", "broken compiler") and not WITH_CMAKE:
        pytest.skip("no CMake")
    tools = tmp_path / "tools"
    tools.mkdir()
    if request.param == "no CMake":
        return dict(hidden=("cmake",), PATH=str(tools)), "CMake was not found; pip install cmake"
    if request.param == "silent CMake":
        script(tools, "cmake", "exit 1")
        return dict(hidden=("cmake",), PATH=str(tools)), "the build ended without a word"
    if request.param == "no PyTorch":
        script(tools, "cmake", "exit 1")
        return (
            dict(hidden=("torch", "cmake"), PATH=str(tools)),
            "PyTorch was not found; reinstall with pip's --no-build-isolation",
        )
    if request.param == "broken compiler":
        broken = script(tools, "broken-c++", "echo no space left; exit 1")
        return (
            dict(CXX=str(broken)),
            f'The C++ compiler "{broken}" is not able to compile a simple test program',
        )
    for name in ("cmake", "make", "ninja", "uname"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    return dict(PATH=str(tools), CXX=""), "no C++ compiler was found; install one"


def test_without_a_tool_the_installation_succeeds_and_says_why(lack, unbuilt, tmp_path):
    arguments, reason = lack
    dist = str(tmp_path / "dist")
    done = set_up(unbuilt, "-q", "bdist_wheel", "--dist-dir", dist, **arguments)
    assert done.returncode == 0, done.stderr
    (found,) = Path(dist).iterdir()
    names, fields = facts(found)
    assert found.name.endswith("-py3-none-any.whl")
    assert fields["Root-Is-Purelib"] == "true"
    assert LIBRARY not in names
    text = zipfile.ZipFile(found).read(REASON).decode()
    assert text.startswith(f"not built when tokenmix_ops was installed: {reason}")
    assert len(text.splitlines()) == 1

    done = set_up(unbuilt, "-q", "build_native", "--strict", **arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"no native library: {reason}")


@buildable
def test_a_failed_build_is_explained_and_the_next_one_succeeds(project, tmp_path):
    source = project / "bindings" / "cpu.cpp"
    text = source.read_text("utf-8")
    place = ["--build-lib", str(tmp_path)]
    try:
        source.write_text(f"#error out of luck\n{text}", "utf-8")
        assert set_up(project, "-q", "build_native", *place).returncode == 0
    finally:
        source.write_text(text, "utf-8")
    reason = (tmp_path / REASON).read_text("utf-8")
    assert re.search("installed: .*cpu.cpp:1:2: error: .*out of luck", reason)
    assert not (tmp_path / LIBRARY).exists()
    assert set_up(project, "-q", "build_native", *place).returncode == 0
    assert (tmp_path / LIBRARY).exists()
    assert not (tmp_path / REASON).exists()


@buildable
def test_an_editable_installation_builds_into_the_source_tree(project):
    done = set_up(project, "-q", "editable_wheel", "--dist-dir", "editable")
    assert done.returncode == 0, done.stderr
    assert (project / LIBRARY).exists()
    (found,) = (project / "editable").glob("*.whl")
    assert not {LIBRARY, REASON} & set(facts(found)[0])


@pytest.fixture
def installer(monkeypatch):
    """The functions of setup.py."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_an_isolated_build_finds_the_pytorch_it_installs_for(installer, monkeypatch, tmp_path):
    find_torch = installer["find_torch"]
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "prefix"))
    monkeypatch.setattr("site.getusersitepackages", lambda: str(tmp_path / "user"))
    assert find_torch() is None
    for place in ("user", "prefix"):
        (tmp_path / place / "torch").mkdir(parents=True)
        assert find_torch() == tmp_path / place / "torch"


FAKE_CMAKE = """
echo "$*, LC_ALL=$LC_ALL" >> {log}
[ "$1" = -S ] || exit {status}
if [ -f "$4/broken" ]; then echo "error: stale"; exit 1; fi
mkdir -p "$4" && touch "$4/CMakeCache.txt"
"""


@pytest.fixture
def configured(installer, monkeypatch, tmp_path):
    """Runs `compiled` with a CMake that fails where its tree is broken; returns what it was
    called with, and whether the tree is there still."""

    def run(status=0, **files):
        log, tree = tmp_path / "log", tmp_path / "build" / "native"
        cmake = script(tmp_path, "cmake", FAKE_CMAKE.format(log=log, status=status))
        tree.mkdir(parents=True)
        for name, text in files.items():
            (tree / name.replace("_", ".")).write_text(text)
        compiled = installer["compiled"]
        changed = dict(ROOT=tmp_path, find_cmake=lambda: str(cmake), find_torch=lambda: tmp_path)
        for name, value in changed.items():
            monkeypatch.setitem(compiled.__globals__, name, value)
        monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
        try:
            compiled()
            reason = None
        except installer["Unbuilt"] as error:
            reason = str(error)
        calls = log.read_text().splitlines()
        assert all(call.endswith("LC_ALL=C") for call in calls)
        return [call.split()[0] for call in calls], reason, tree.exists()

    return run


def test_a_tree_that_is_stale_is_configured_anew(configured):
    calls, reason, _ = configured(broken="", CMakeCache_txt="")
    assert calls == ["-S", "-S", "--build"]
    assert reason is None


def test_a_fresh_tree_is_configured_once(configured):
    assert configured(broken="") == (["-S"], "error: stale", False)


def test_after_a_failed_build_nothing_is_remembered(configured):
    found = configured(status=1)
    assert found == (["-S", "--build"], "the build ended without a word", False)


@buildable
def test_a_pytorch_that_is_too_old_is_refused_with_its_version(installer, unbuilt, tmp_path):
    cmake, torch = installer["find_cmake"](), tmp_path / "torch"
    torch.mkdir()
    for name in ("include", "lib"):
        (torch / name).symlink_to(installer["find_torch"]() / name)
    for version in ("none", "2.9.1+cpu"):
        if version != "none":
            (torch / "version.py").write_text(f"__version__ = '{version}'\n")
        command = [cmake, "-S", str(unbuilt), "-B", str(tmp_path / "build")]
        with pytest.raises(installer["Unbuilt"]) as error:
            installer["call"]([*command, f"-DTOKENMIX_TORCH={torch}"])
        assert str(error.value) == (
            f"expected PyTorch 2.10 or later, with headers, in {torch}, got {version}"
        )


@buildable
def test_a_tree_of_another_checkout_or_compiler_is_configured_anew(tmp_path):
    project = copied(tmp_path)
    # A project that takes no time to compile.
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(small LANGUAGES CXX)\n"
        'file(WRITE "${CMAKE_BINARY_DIR}/libtokenmix_cpu.so" "")\n'
    )
    compiler = tmp_path / "passing-c++"
    compiler.symlink_to(COMPILER)
    first = set_up(project, "-q", "build_native", "--strict", CXX=str(compiler))
    assert first.returncode == 0, first.stderr
    compiler.unlink()
    without = set_up(project, "-q", "build_native", "--strict")
    assert without.returncode == 0, without.stderr
    moved = project.rename(tmp_path / "moved")
    done = set_up(moved, "-q", "build_native", "--strict")
    assert done.returncode == 0, done.stderr


CAUSES = {
    "-- Checking\nCMake Error at CMakeLists.txt:3 (message):\n  expected GCC or Clang,\n"
    "  got MSVC\n\n\n-- Configuring incomplete\n": "expected GCC or Clang, got MSVC",
    "CMake Error at C.cmake:9 (message):\n  Compiler\n\n    c++\n\n  is broken.\n\n  It fails\n": (
        "Compiler c++ is broken"
    ),
    "[ 5%] Building\na.cpp:3: error: no\n    3 | x\nmake: *** Error 1\n": "a.cpp:3: error: no",
    "first\nKilled\n": "Killed",
    "": "the build ended without a word",
}


@pytest.mark.parametrize("output", CAUSES)
def test_the_sentence_that_tells_why_is_found(installer, output):
    assert installer["cause"](output) == CAUSES[output]


def test_importing_does_not_load_the_library():
    code = (
        "import tokenmix_ops, torch; print(hasattr(torch.ops.tokenmix_ops, 'cpu_isas'));"
        "ready = 'cpu' in tokenmix_ops.available_backends();"
        "print(ready == hasattr(torch.ops.tokenmix_ops, 'cpu_isas'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tokenmix_ops.__file__).parents[1])}
    out = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert out.split() == ["False", "True"]
