"""Chooses the versions that the environments of this project install; make calls it."""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
# PyAV 18 needs it; the core of the package, which torch alone serves, runs on an older one.
OLDEST_PYTHON = "3.11"
# What the tests of another set of versions import; `dev` is for the locked environment alone.
TESTED_EXTRAS = ("triton", "video", "metrics", "test")
# TORCH= chooses these: torch itself, and what CUDA builds of it alone bring.
TORCH_CHOOSES = re.compile(r"(torch|nvidia-.*|cuda-.*)==")


class Unresolved(Exception):
    """No set of versions satisfies what was asked for, or the index could not be asked."""


def declared(extras=None):
    """The requirements of pyproject.toml, of building and of these extras (all if None)."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = data["project"]["optional-dependencies"]
    lists = [data["build-system"]["requires"], data["project"]["dependencies"]]
    lists += [optional[extra] for extra in (optional if extras is None else extras)]
    return [Requirement(line) for one in lists for line in one]


def without_upper_bounds(requirement):
    """A copy of the requirement that any later release satisfies too."""
    copy = Requirement(str(requirement))
    copy.specifier = SpecifierSet(
        ",".join(str(each) for each in requirement.specifier if each.operator in (">", ">=", "!="))
    )
    return copy


def pins(text):
    """The requirements that a lock holds, in its order."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def version_of(pin):
    return str(pin.specifier).removeprefix("==")


def in_force(requirements):
    """Those that apply to this Python and platform."""
    return [each for each in requirements if each.marker is None or each.marker.evaluate()]


def resolve(requirements, torch, out, *options):
    """Writes what satisfies the requirements to out, where uv finds its preferences too."""
    # CUDA builds of torch ask for one Triton, which `fit` sees to; CPU builds take any.
    overrides = out.with_suffix(".overrides")
    overrides.write_text("".join(f"{each}\n" for each in requirements if each.name == "triton"))
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--output-file", str(out)]
    command += ["--overrides", str(overrides), "--only-binary", ":all:", "--no-python-downloads"]
    command += ["--quiet", "--no-header", "--no-annotate", *options]
    asked = "".join(f"{each}\n" for each in [torch, *requirements])
    try:
        run = subprocess.run(command, input=asked, text=True, capture_output=True, cwd=ROOT)
    finally:
        overrides.unlink()
    if run.returncode:
        raise Unresolved(
            "uv found no versions for these requirements (it asks PyPI, or the index that "
            f"UV_DEFAULT_INDEX names):\n{run.stderr.strip()}"
        )
    lines = out.read_text().splitlines()
    out.write_text("".join(f"{line}\n" for line in lines if not TORCH_CHOOSES.match(line)))


def lock(torch, out):
    """The newest versions in range: this Python's, and the same for others where they can."""
    resolve(declared(), torch, out)
    resolve(declared(), torch, out, "--universal", "--python-version", OLDEST_PYTHON)
    python = ".".join(map(str, sys.version_info[:2]))
    out.write_text(
        f"# Written by `make lock` for {torch}, on Python {python}; not by hand.\n{out.read_text()}"
    )


def floor(torch, out):
    """The lowest versions that pyproject.toml allows, of what it names itself."""
    resolve(declared(TESTED_EXTRAS), torch, out, "--resolution", "lowest-direct")


def newest(torch, out):
    """The newest versions there are, past the upper bounds of pyproject.toml."""
    resolve([without_upper_bounds(each) for each in declared(TESTED_EXTRAS)], torch, out)


def differences(text, locked):
    """A line for each version that is not the lock's."""
    versions = {each.name: version_of(each) for each in in_force(pins(locked))}
    return [
        f"{each.name} {version_of(each)}, locked: {versions.get(each.name, 'none')}"
        for each in in_force(pins(text))
        if version_of(each) != versions.get(each.name)
    ]


def fit(text, wanted):
    """The pins without those that the build of torch, by its requirements `wanted`, excludes."""
    limits = defaultdict(SpecifierSet)
    for each in in_force(wanted):
        limits[canonicalize_name(each.name)] &= each.specifier
    return [
        each
        for each in in_force(pins(text))
        if limits[canonicalize_name(each.name)].contains(version_of(each), prereleases=True)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for make in (lock, floor, newest):
        command = commands.add_parser(make.__name__, help=make.__doc__)
        command.add_argument("torch", help="the release of torch to go with, such as torch==2.13.0")
        command.add_argument("out", type=Path, help="the file to write, if anything changes")
        command.set_defaults(make=make)
    command = commands.add_parser("differences", help=differences.__doc__)
    command.add_argument("pins", type=Path)
    command = commands.add_parser("fit", help="prints the pins that the torch here allows")
    command.add_argument("pins", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "fit":
            wanted = importlib.metadata.requires("torch") or []
            kept = fit(arguments.pins.read_text(), [Requirement(each) for each in wanted])
            print(*kept, sep="\n")
        elif arguments.command == "differences":
            found = differences(arguments.pins.read_text(), LOCK.read_text())
            print(*(found or ["nothing"]), sep="\n")
        else:
            draft = arguments.out.with_suffix(".draft")
            draft.unlink(missing_ok=True)
            try:
                arguments.make(arguments.torch, draft)
                old = arguments.out.read_text() if arguments.out.exists() else None
                if draft.read_text() != old:
                    os.replace(draft, arguments.out)
            finally:
                draft.unlink(missing_ok=True)
    except (Unresolved, OSError, importlib.metadata.PackageNotFoundError) as error:
        sys.exit(f"{parser.prog} {arguments.command}: {error}")


if __name__ == "__main__":
    main()
