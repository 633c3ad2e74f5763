"""docs/interfaces.md and the code agree on what is used of other packages, and the tests exist."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import nn

ROOT = Path(__file__).parent.parent
SOURCES = (ROOT / "tokenmix_ops", ROOT / "bench")
PAGE = ROOT / "docs" / "interfaces.md"

# Packages of which whatever does not come from the top module has to have a row.
MOVING = (
    *("accelerate", "av", "flash_attn", "huggingface_hub", "open_clip", "peft", "pycocoevalcap"),
    *("timm", "transformers", "triton", "tyro", "xformers"),
)
PUBLIC = ("triton.language",)
# Private by their names alone.
STANDARD = {"_asdict", "_exit", "_fields", "_make", "_replace"}


class Row(NamedTuple):
    """A line of a table."""

    files: tuple[str, ...]
    used: str
    tests: tuple[str, ...]


def rows(text):
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            files, used, tests = cells
            found.append(Row(quoted(files), used, quoted(tests)))
    return found


def quoted(text):
    return tuple(re.findall(r"`([^`]+)`", text))


ROWS = rows(PAGE.read_text("utf-8"))


@cache
def tree(path):
    return ast.parse(path.read_text("utf-8"))


@cache
def defined():
    """Names that the project itself gives to something."""
    names = set()
    for path in (path for folder in SOURCES for path in folder.rglob("*.py")):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own = isinstance(node.value, ast.Name) and node.value.id == "self"
                names |= {node.attr} if own else set()
    return names - set(vars(nn.Module()))


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def foreign(source):
    """Names of other packages in a source that are private, or not of a package's top module."""
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            found |= {text} if text.isidentifier() and is_private(text) and len(text) > 5 else set()
            found |= {"transformers.models"} if text.startswith("transformers.models") else set()
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            parts = node.module.split(".")
            private = parts[0] == "torch" and any(map(is_private, parts))
            moving = parts[0] in MOVING and len(parts) > 1 and node.module not in PUBLIC
            unstable = private or moving or node.module.startswith("torch.fx.")
            for alias in node.names:
                if parts[0] not in ("tokenmix_ops", "bench") and (
                    unstable or is_private(alias.name)
                ):
                    found.add(alias.name)
    return found - STANDARD - {"_bwd", "_fwd"}


def missing(file, used):
    """Names that a file uses and that no row of it has."""
    text = " ".join(row.used for row in ROWS if file in row.files)
    words = set(re.findall(r"\w+", " ".join(quoted(text)))) | set(quoted(text))
    return sorted(name for name in used if name not in words)


FILES = [
    path.relative_to(ROOT).as_posix() for folder in SOURCES for path in sorted(folder.rglob("*.py"))
]


@pytest.mark.parametrize("file", FILES)
def test_what_a_file_uses_of_others_has_a_row(file):
    used = foreign(tree(ROOT / file)) - defined()
    assert missing(file, used) == [], f"give them a row in {PAGE.relative_to(ROOT)}"


def marks_of(path):
    """The tests of a file, with whether each has the mark of interfaces."""
    module = tree(path)
    everywhere = any(
        isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "pytestmark"
        and "pytest.mark.interfaces" in ast.unparse(node.value)
        for node in module.body
    )
    return {
        node.name: everywhere
        or any("pytest.mark.interfaces" in ast.unparse(mark) for mark in node.decorator_list)
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_the_page_has_rows():
    assert len(ROWS) > 50
    assert all(row.used and row.tests for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.files[0]}: {row.used[:40]}")
def test_files_and_tests_of_a_row_exist_and_one_has_the_mark(row):
    for file in row.files:
        assert (ROOT / file).is_file(), file
        assert file in FILES, file
    marked = []
    for name in row.tests:
        path, _, test = name.partition("::")
        assert (ROOT / path).is_file(), path
        found = marks_of(ROOT / path)
        assert not test or test in found, name
        marked.append(found[test] if test else all(found.values()))
    assert any(marked), "no test of it is marked pytest.mark.interfaces"


def test_private_names_are_found():
    source = """
import torch, av.container
from transformers.models.blip import Layer
from torch._dynamo import explain
from torch.nn import _reduction
from triton import language
from triton.compiler import ASTSource
from tokenmix_ops.plan import _own
torch._C._functorch.stack()
value._replace(a="_forward_hooks", b="transformers.models.x", c="_", d=self.__dict__)
"""
    assert foreign(ast.parse(source)) == {
        *("Layer", "explain", "_reduction", "ASTSource", "_C", "_functorch"),
        *("_forward_hooks", "transformers.models"),
    }


def test_what_the_page_lacks_is_named():
    assert missing("tokenmix_ops/convert.py", {"_surely_new"}) == ["_surely_new"]
    assert missing("tokenmix_ops/timing.py", {"_sleep"}) == []
    assert missing("tokenmix_ops/plan.py", {"_sleep"}) == ["_sleep"]
