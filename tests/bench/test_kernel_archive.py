"""Kernels that are carried to a GPU are found there, or not used, and either is said."""

import json
import os
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import kernel_archive

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

HASHES = ("00" * 32, "ff" * 32)
FOLDERS = ("A" * 52, "7" * 51 + "Q")
FACTS = {"architecture": "sm_90", "commit": "1234567", "date": "2026-01-01"}


@pytest.fixture
def cache(tmp_path):
    """A Triton cache of three kernels, as the compiler leaves it."""
    folder = tmp_path / "cache"
    for name in (*FOLDERS, "B" * 52):
        (folder / name).mkdir(parents=True)
        files = {"kernel.cubin": name, "kernel.json": "{}", "kernel.source": "module"}
        files["__grp__kernel.json"] = json.dumps({"child_paths": {"kernel.json": "/elsewhere"}})
        for file, text in files.items():
            (folder / name / file).write_text(text)
    return folder


@pytest.fixture
def archive(cache, tmp_path):
    path = tmp_path / "cache.tar.xz"
    kernel_archive.pack(cache, HASHES, path, FACTS)
    return path


def test_kernels_are_unpacked_with_lists_of_where_they_lie_now(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = kernel_archive.unpack(archive, Path("there"), "1234567")
    assert said == "2 kernels from cache.tar.xz, compiled on 2026-01-01 from commit 1234567"
    assert sorted(os.listdir("there")) == sorted(FOLDERS)
    for name in FOLDERS:
        folder = tmp_path / "there" / name
        files = {f"kernel.{kind}": str(folder / f"kernel.{kind}") for kind in ("cubin", "json")}
        assert sorted(os.listdir(folder)) == ["__grp__kernel.json", *files]
        assert json.loads((folder / "__grp__kernel.json").read_text()) == {"child_paths": files}
        assert (folder / "kernel.cubin").read_text() == name


def test_the_manifest_says_what_made_the_kernels(archive):
    with tarfile.open(archive) as tar:
        manifest = json.load(tar.extractfile("manifest.json"))
    assert manifest == {**FACTS, "kernels": 2, "maker": kernel_archive.maker()}
    assert len(manifest["maker"]["Triton's sources"]) == 12


@pytest.mark.parametrize("name", ["Python", "Triton", "Triton's sources", "ptxas"])
def test_kernels_for_another_triton_are_not_used(archive, tmp_path, monkeypatch, name):
    here = kernel_archive.maker()
    monkeypatch.setattr(kernel_archive, "maker", lambda: {**here, name: "another"})
    assert kernel_archive.unpack(archive, tmp_path / "there") == (
        f"cache.tar.xz is not used: its kernels are for {name} {here[name]}, here is {name} another"
    )
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(("capability", "used"), [((9, 0), True), ((8, 0), False)])
def test_kernels_for_another_gpu_are_not_used(archive, tmp_path, monkeypatch, capability, used):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    said = kernel_archive.unpack(archive, tmp_path / "there", "1234567")
    refusal = "cache.tar.xz is not used: its kernels are for GPU sm_90, here is GPU sm_80"
    assert (said == refusal) != used
    assert (tmp_path / "there").exists() == used


@pytest.mark.parametrize("commit", ["7654321", None])
def test_kernels_of_another_commit_are_used_and_it_is_said(archive, tmp_path, monkeypatch, commit):
    monkeypatch.setattr(kernel_archive, "environment", lambda: {"commit": "7654321"})
    said = kernel_archive.unpack(archive, tmp_path / "there", commit)
    assert said.endswith(
        "from commit 1234567, but the code is at 7654321: kernels that differ are compiled again"
    )
    assert (tmp_path / "there").exists()


def test_nothing_is_said_of_a_commit_that_is_not_known(archive, tmp_path):
    said = kernel_archive.unpack(archive, tmp_path / "there", "unknown")
    assert said.endswith("from commit 1234567")


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "another file": lambda path: path.write_bytes(b"PK" * 1000),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_archive_is_not_used(archive, tmp_path, kind):
    DAMAGE[kind](archive)
    said = kernel_archive.unpack(archive, tmp_path / "there")
    assert said.startswith("cache.tar.xz is not used: it cannot be unpacked (")
    assert not (tmp_path / "there").exists()


def test_an_archive_without_a_manifest_is_not_used(tmp_path):
    path = tmp_path / "other.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        tar.add(__file__, "test.py")
    said = kernel_archive.unpack(path, tmp_path / "there")
    assert said == "other.tar.xz is not used: it cannot be unpacked ('manifest.json')"


def test_nothing_is_written_outside_the_folder(archive, tmp_path):
    with tarfile.open(archive) as tar:
        manifest = tar.extractfile("manifest.json").read()
    (tmp_path / "manifest.json").write_bytes(manifest)
    (tmp_path / "bad.json").write_text("{}")
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(tmp_path / "manifest.json", "manifest.json")
        tar.add(tmp_path / "bad.json", "../stray.json")
        tar.add(tmp_path / "bad.json", f"{FOLDERS[0]}/kernel.so")
    kernel_archive.unpack(archive, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    assert not (tmp_path / "stray.json").exists()


@pytest.mark.interfaces
def test_triton_has_what_a_cache_depends_on_where_it_is_looked_for(tmp_path):
    assert all(kernel_archive.maker().values())
    found = kernel_archive.variables(tmp_path)
    assert os.access(found["TRITON_PTXAS_PATH"], os.X_OK)
    assert found["TRITON_CACHE_DIR"] == str(tmp_path)
