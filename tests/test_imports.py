"""Who may import whom; that the core needs PyTorch alone; and what a missing extra says."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import tokenmix_ops

PACKAGE = Path(tokenmix_ops.__file__).parent
NAME = "tokenmix_ops"

# From the bottom up, rooms of one floor together. A room is a module, or a package and all in it.
# A module may import its own room and every lower floor.
FLOORS = (
    ("arguments", "torch_internals"),
    ("plan",),
    ("mixing",),
    ("ops",),
    ("backends.*",),
    ("backends",),
    ("functional",),
    ("projections",),
    ("modules",),
    ("families",),
    ("convert",),
    ("timing",),
    ("peers",),
    ("peer_layers",),
    ("video.files", "video.hub"),
    ("video.data", "video.metrics"),
    ("video.text", "video.layer", "video.cross_attention"),
    ("video.blip",),
    ("video.weights",),
    ("video.encoder",),
    ("video.tuning",),
    ("video.captioning", "video.retrieval"),
    ("video.checkpoints", "video.export", "video.parameters"),
    ("video.engine",),
    ("video.experiments",),
    ("video.search",),
    ("video.demo",),
    ("video.cli",),
)
# The public faces, and what they may show.
FACES = {"": "convert", "video": "video.engine"}
# Helpers of tests and benchmarks: the highest floor that each reaches, and the helpers it may use.
HELPERS = {
    "reference": ("mixing", ()),
    "tolerance": ("plan", ()),
    "testing": ("mixing", ("tolerance",)),
}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def place(module):
    """(floor, room) of a module, named without the package; ValueError if it has none."""
    for floor, rooms in enumerate(FLOORS):
        for room in rooms:
            parent = room.removesuffix(".*")
            if room != parent and module.startswith(parent + "."):
                return floor, ".".join(module.split(".")[: parent.count(".") + 2])
            if room == parent and (module == room or module.startswith(room + ".")):
                if f"{room}.*" in sum(FLOORS, ()) and module != room:
                    continue
                return floor, room
    raise ValueError(f"{module} has no floor; give it one in tests/test_imports.py")


def imported(module, source, known, is_package):
    """Modules of the package that a module's source imports, wherever in it, by short name."""
    package = f"{NAME}.{module}".rstrip(".").split(".")
    package = package if is_package else package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            names = []
            for alias in node.names:
                submodule = f"{base}.{alias.name}".removeprefix(NAME + ".")
                names.append(f"{NAME}.{submodule}" if submodule in known else base)
        else:
            continue
        for name in names:
            if name == NAME or name.startswith(NAME + "."):
                yield name.removeprefix(NAME).removeprefix(".")
            elif name.split(".")[0] == "bench":
                yield "bench"


def problem_of(module, target):
    """Why a module may not import another one; None if it may."""
    if target == "bench":
        return "the package never imports bench"
    if module == target:
        return None
    if target in HELPERS:
        allowed = target in HELPERS.get(module, ("", ()))[1]
        return None if allowed else f"only bench and tests import {target}"
    if module in FACES or module in HELPERS:
        highest = FACES[module] if module in FACES else HELPERS[module][0]
        if target in FACES:
            return f"{module or NAME} must not import a face"
        return None if place(target)[0] <= place(highest)[0] else f"it may reach up to {highest}"
    floor, room = place(module)
    if target in FACES:
        lowest = "timing" if target == "" else "video.demo"
        reaches = floor >= place(lowest)[0]
        return None if reaches else "the public face stands above it"
    target_floor, target_room = place(target)
    if target_floor < floor or target_room == room:
        return None
    return f"floor {target_floor} ({target_room}) is not below floor {floor} ({room})"


def problems(module, source, known=None, is_package=False):
    known = MODULES if known is None else known
    return [
        f"{NAME}.{module} imports {target or NAME}: {problem}"
        for target in imported(module, source, known, is_package)
        if (problem := problem_of(module, target))
    ]


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name or NAME)
def test_imports_run_downward(module):
    path = MODULES[module]
    found = problems(module, path.read_text("utf-8"), is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_the_core_is_there_and_has_its_floors():
    core = {"mixing", "backends", "backends.eager", "functional", "modules", "convert"}
    assert (
        core | {"", "reference", "testing", "tolerance", "video", "video.encoder"} <= MODULES.keys()
    )
    assert place("backends.eager")[0] < place("backends")[0]
    assert place("backends.triton.kernels") == place("backends.triton")
    assert place("backends.triton")[1] != place("backends.eager")[1]
    assert place("video.data.clips") == place("video.data.shapes")


FORBIDDEN = {
    "upward": ("mixing", "from tokenmix_ops.functional import explain"),
    "upward, as a module": ("functional", "import tokenmix_ops.modules"),
    "upward, renamed": ("modules", "import tokenmix_ops.convert as c"),
    "upward, out of the package": ("modules", "from tokenmix_ops import convert"),
    "upward, inside a function": ("mixing", "def f():\n    from tokenmix_ops import backends"),
    "upward, relative": ("mixing", "from .functional import explain"),
    "upward, relative module": ("mixing", "from . import modules"),
    "up out of a room": ("backends.eager", "from .. import functional"),
    "a backend its choosers": ("backends.eager", "from tokenmix_ops.backends import select"),
    "a backend another one": ("backends.native", "from tokenmix_ops.backends import eager"),
    "a backend another one's parts": ("backends.triton.fwd", "import tokenmix_ops.backends.eager"),
    "a backend the reference": ("backends.eager", "import tokenmix_ops.reference"),
    "the core the reference": ("functional", "from tokenmix_ops import reference"),
    "the core the cases": ("convert", "from tokenmix_ops.testing import CASES"),
    "the core its face": ("functional", "import tokenmix_ops"),
    "the core the version": ("convert", "from tokenmix_ops import __version__"),
    "the core the video part": ("convert", "from tokenmix_ops.video.encoder import VideoEncoder"),
    "the core the benchmarks": ("modules", "from bench import rows"),
    "the core the clocks": ("modules", "from tokenmix_ops import timing"),
    "the clocks the peers": ("timing", "from tokenmix_ops.peers import operators"),
    "the peers the cases": ("peers", "from tokenmix_ops.testing import CASES"),
    "the face the video part": ("", "from tokenmix_ops import video"),
    "the face the benchmarks": ("", "import bench.rows"),
    "the video face the commands": ("video", "from tokenmix_ops.video.cli import main"),
    "the video part the cases": ("video.encoder", "from tokenmix_ops.testing import CASES"),
    "data the encoder": ("video.data.clips", "from tokenmix_ops.video.encoder import VideoEncoder"),
    "data the video face": ("video.data.clips", "from tokenmix_ops.video import VideoEncoder"),
    "the encoder the benchmarks": ("video.encoder", "import bench"),
    "one task the other": ("video.captioning", "from tokenmix_ops.video import retrieval"),
    "the demo the benchmarks": ("video.demo", "def f():\n    import bench.layers as layers"),
    "the tolerance the cases": ("tolerance", "from tokenmix_ops.testing import CASES"),
    "the demo the commands": ("video.demo", "from tokenmix_ops.video.cli import main"),
    "the cases more than mixings": ("testing", "from tokenmix_ops import functional"),
    "the reference the cases": ("reference", "from tokenmix_ops.testing import CASES"),
    "the reference its face": ("reference", "import tokenmix_ops as tm"),
}
ALLOWED = {
    "downward": ("functional", "from tokenmix_ops.mixing import Mixing"),
    "the choosers a backend": ("backends", "from tokenmix_ops.backends import eager"),
    "inside a backend": ("backends.triton.fwd", "from tokenmix_ops.backends.triton import tiles"),
    "other packages": ("mixing", "import torch, json\nfrom video.cli import main"),
    "the face the core": ("", "from tokenmix_ops.convert import mix_tokens"),
    "the video part the face": ("video.encoder", "import tokenmix_ops as tm"),
    "the peers the clocks": ("peers", "from tokenmix_ops.timing import ratio"),
    "the peers the face": ("peers", "import tokenmix_ops as tm"),
    "the demo the peers": ("video.demo", "from tokenmix_ops import peers"),
    "the cases the tolerance": ("testing", "from tokenmix_ops.tolerance import FUSED"),
    "the cases mixings": ("testing", "from tokenmix_ops.mixing import Mixing"),
    "inside a room": ("video.data.shapes", "from tokenmix_ops.video.data.clips import read_clip"),
    "the video face the encoder": ("video", "from tokenmix_ops.video.encoder import VideoEncoder"),
    "the commands the demo": ("video.cli", "from tokenmix_ops.video import demo"),
    "the commands the version": ("video.cli", "from tokenmix_ops import __version__"),
}
IMAGINED = {
    *MODULES,
    *("backends.native", "backends.triton", "backends.triton.tiles", "video.retrieval"),
    *("timing", "peers", "video.demo", "video.cli"),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_is_forbidden_is_found(case):
    assert len(problems(*FORBIDDEN[case], IMAGINED)) == 1


@pytest.mark.parametrize("case", ALLOWED)
def test_what_is_allowed_is_not_found(case):
    module, source = ALLOWED[case]
    assert problems(module, source, IMAGINED, is_package=module in ("", "backends")) == []


def test_a_module_without_a_floor_is_named():
    with pytest.raises(ValueError, match=r"^new has no floor; give it one in tests/test_imports"):
        problems("new", "import tokenmix_ops.mixing")


def python(code):
    """Runs code in a fresh interpreter that knows nothing of this process but the package."""
    environment = {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CORE_ALONE = """
import re, sys, sysconfig
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

def plain(name):
    return re.sub("[-_.]+", "-", name).lower()

def closure(name, found):
    if name not in found:
        found.add(name)
        try:
            needs = requires(name) or ()
        except PackageNotFoundError:
            needs = ()
        for need in needs:
            if "extra ==" not in need:
                closure(plain(re.match("[A-Za-z0-9._-]+", need).group()), found)
    return found

# PyTorch declares Triton on some platforms, and uses NumPy where it finds it.
torch_needs = (closure("torch", set()) | {"numpy"}) - {"triton"}
own = {"tokenmix_ops", "torch", "torchgen", "functorch"}
allowed = own | set(sys.stdlib_module_names) | {sysconfig._get_sysconfigdata_name()}
for top, distributions in packages_distributions().items():
    if torch_needs.intersection(map(plain, distributions)):
        allowed.add(top)

class Blocking:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name.split(".")[0] in allowed else None

sys.meta_path[sys.meta_path.index(PathFinder)] = Blocking
for name in ("transformers", "av", "tyro", "rich", "matplotlib", "triton", "pytest"):
    assert name not in allowed and name not in sys.modules, name
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name + " is not blocked")
"""

USE_THE_CORE = """
import torch
import tokenmix_ops as tm

assert not torch.cuda.is_initialized()
video = [torch.randn(2, 4, 10, 3, 8, requires_grad=True) for _ in range(3)]
for mixing in ("released", "paper", "adjacent", "temporal"):
    output = tm.token_mix_attention(*video, mixing=mixing)
    output.sum().backward()
    assert output.isfinite().all()
assert tm.explain(*video, "released").backend in tm.available_backends()
attention = tm.TokenMixAttention(12, 3, num_frames=4)
assert attention(torch.randn(8, 10, 12)).shape == (8, 10, 12)
try:
    tm.mix_tokens(attention)
except ValueError as error:
    assert "no supported vision tower" in str(error)
shown = {name.split(".")[0] for name in sys.modules}
assert not shown & {"transformers", "av", "tyro", "rich", "matplotlib", "triton"}, shown
assert "tokenmix_ops.video" not in sys.modules and "bench" not in sys.modules
assert "tokenmix_ops.testing" not in sys.modules and "tokenmix_ops.reference" not in sys.modules
for name in tm.__all__:
    getattr(tm, name)
print("works")
"""


@pytest.mark.parametrize("hidden", ["", "sys.modules['numpy'] = None"], ids=["", "no NumPy"])
def test_the_core_needs_nothing_but_pytorch(hidden):
    assert python(CORE_ALONE + hidden + USE_THE_CORE).strip() == "works"


MISSING_EXTRA = """
import sys
missing = {missing}
for name in missing:
    sys.modules[name] = None
from tokenmix_ops import video
for name in video.__all__:
    try:
        getattr(video, name)
        print(name, "works")
    except ModuleNotFoundError as error:
        assert error.name in missing, error
        assert str(error) == (
            f"tokenmix_ops.video.{{name}} needs {{error.name!r}}: "
            "pip install 'tokenmix_ops[video]'"
        ), error
        print(name, "needs", error.name)
try:
    video.nothing
except AttributeError as error:
    print(error)
"""


NEEDS = {"read_clip": "av", "VideoEncoder": "transformers"}


@pytest.mark.parametrize("hidden", NEEDS.values())
def test_a_missing_extra_is_named_with_the_command_that_brings_it(hidden):
    missing = [name for name in NEEDS.values() if name == hidden or find_spec(name) is None]
    lines = python(MISSING_EXTRA.format(missing=missing)).splitlines()
    verdicts = dict(line.split(" ", 1) for line in lines[:-1])
    for shown, extra in NEEDS.items():
        assert verdicts[shown] == (f"needs {extra}" if extra in missing else "works")
    assert lines[-1] == "module 'tokenmix_ops.video' has no attribute 'nothing'"
