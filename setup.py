"""Builds the package: what pyproject.toml declares, and the native library, by CMake.

An installation never fails because the native library cannot be built: the file ``no_cpu.txt`` in
its place then says why, for `tokenmix_ops.explain` to repeat.
"""

import os
import re
import shutil
import site
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PLACE = Path("tokenmix_ops", "lib")
LIBRARY, REASON = "libtokenmix_cpu.so", "no_cpu.txt"
SOURCES = ("CMakeLists.txt", "CMakePresets.json", "cmake/*", "kernels/**/*", "bindings/**/*")


class Unbuilt(Exception):
    """Why there is no native library, in a sentence."""


class BuildNative(Command):
    """A part of ``build``: compiles the native library, with --inplace into the source tree."""

    description = "build the native library with CMake"
    user_options: ClassVar[list] = [
        ("build-lib=", "d", "the directory to build to"),
        ("inplace", "i", "build into the source tree"),
        ("strict", None, "fail if the library cannot be built"),
    ]
    boolean_options: ClassVar[list] = ["inplace", "strict"]
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None
        self.inplace = self.strict = False

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    @property
    def folder(self):
        return (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / PLACE

    def run(self):
        try:
            tree = compiled()
        except Unbuilt as reason:
            if self.strict:
                raise SystemExit(f"no native library: {reason}") from None
            print(f"no native library: {reason}")
            text = f"not built when tokenmix_ops was installed: {reason}\n"
            (self.emptied_folder() / REASON).write_text(text, "utf-8")
        else:
            shutil.copy(tree / LIBRARY, self.emptied_folder())
            self.distribution.has_native_library = True

    def emptied_folder(self):
        """Removes what an earlier build left; running programs keep the library that they use."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, REASON):
            (self.folder / name).unlink(missing_ok=True)
        return self.folder

    def get_source_files(self):
        found = (path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file())
        return sorted(path.relative_to(ROOT).as_posix() for path in found)

    def get_outputs(self):
        names = (LIBRARY, REASON)
        return [str(self.folder / name) for name in names if (self.folder / name).exists()]

    def get_output_mapping(self):
        return {}


def compiled():
    """Configures and builds; returns the folder of the library, or raises `Unbuilt`."""
    if (cmake := find_cmake()) is None:
        raise Unbuilt("CMake was not found; pip install cmake, then reinstall tokenmix_ops")
    if (torch := find_torch()) is None:
        raise Unbuilt("PyTorch was not found; reinstall with pip's --no-build-isolation")
    tree = ROOT / "build" / "native"
    options = [f"-DTOKENMIX_TORCH={torch}", "-DTOKENMIX_TESTS=OFF"]
    configure = [cmake, "-S", str(ROOT), "-B", str(tree), *options]
    is_used = (tree / "CMakeCache.txt").exists()
    try:
        try:
            call(configure)
        except Unbuilt:
            if not is_used:
                raise
            # The tree may remember a compiler that is gone, or a checkout that was moved.
            shutil.rmtree(tree)
            call(configure)
        call([cmake, "--build", str(tree), "--parallel", str(os.cpu_count() or 1)])
    except Unbuilt:
        # CMake would remember a compiler that failed, whatever CXX says next time.
        shutil.rmtree(tree, ignore_errors=True)
        raise
    return tree


def find_cmake():
    try:
        from cmake import CMAKE_BIN_DIR
    except ImportError:
        return shutil.which("cmake")
    return os.path.join(CMAKE_BIN_DIR, "cmake")


def find_torch():
    """The folder of the PyTorch package, whose headers are needed; any release will do."""
    spec = find_spec("torch")
    if spec is not None and spec.origin:
        return Path(spec.origin).parent
    # pip isolates a build in the interpreter that it installs for, where PyTorch may well lie.
    places = (sysconfig.get_path("platlib"), site.getusersitepackages())
    return next((folder for place in places if (folder := Path(place, "torch")).is_dir()), None)


def call(command):
    """Runs CMake; raises `Unbuilt` if it fails, with a sentence out of its messages."""
    try:
        done = subprocess.run(
            command,
            # Compilers translate their messages, and `cause` reads English.
            env={**os.environ, "LC_ALL": "C"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise Unbuilt(f"CMake does not start: {error}") from None
    print(done.stdout, flush=True)
    if done.returncode:
        raise Unbuilt(cause(done.stdout))


def cause(output):
    """The sentence of a failed build's output that tells why."""
    if "No CMAKE_CXX_COMPILER could be found" in output:
        return "no C++ compiler was found; install one, then reinstall tokenmix_ops"
    # A message is indented, and ends with its first sentence or before the next unindented line.
    if complaint := re.search(r"CMake Error[^\n]*:\n(.+?)(?:\.\n|\n(?=\S)|\Z)", output, re.DOTALL):
        return " ".join(complaint[1].split())
    lines = output.strip().splitlines() or ["the build ended without a word"]
    return next((line for line in lines if re.search(r"\berror\b", line, re.I)), lines[-1]).strip()


class Wheel(bdist_wheel):
    """A wheel of any Python 3, for one platform if it holds the library and for all if not."""

    def run(self):
        self.run_command("build_native")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


class WithNativeLibrary(Distribution):
    has_native_library = False

    def has_ext_modules(self):
        return self.has_native_library


build.sub_commands.append(("build_native", None))
setup(distclass=WithNativeLibrary, cmdclass={"build_native": BuildNative, "bdist_wheel": Wheel})
