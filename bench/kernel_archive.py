"""Compiled Triton kernels in one file, to be carried to the GPU that will run them.

Triton finds a kernel in its cache by a hash of what made it: its source and that of the functions
it calls; types, alignment and constants of its arguments; options, target, and variables that
change what is compiled; Triton's own sources, and the version of ptxas. Paths count for nothing,
except that a cache lists each kernel's files by absolute ones: `unpack` writes these lists itself.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import lzma
import re
import sys
import tarfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from tokenmix_ops.timing import environment

MANIFEST = "manifest.json"
GPU, UNKNOWN = "GPU", "unknown"
FILE = re.compile(r"[A-Z2-7]+/(?!__grp__)\w+\.(cubin|json)")
"""A kernel's code or facts, in a folder named after its hash."""


def maker() -> dict[str, str]:
    """What must be the same for kernels to be found: Python, Triton, its sources, and ptxas."""
    import triton
    from triton import knobs
    from triton.runtime.cache import triton_key

    return {
        "Python": ".".join(map(str, sys.version_info[:2])),
        "Triton": triton.__version__,
        "Triton's sources": hashlib.sha256(triton_key().encode()).hexdigest()[:12],
        "ptxas": knobs.nvidia.ptxas.version,
    }


def variables(folder: Path) -> dict[str, str]:
    """What the environment of a process has to say for Triton to find kernels in a folder.

    PyTorch's compiler would name another ptxas, once it has compiled something in the process.
    """
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return {"TRITON_CACHE_DIR": str(folder.absolute()), "TRITON_PTXAS_PATH": str(ptxas)}


def pack(folder: Path, hashes: Collection[str], archive: Path, facts: dict[str, Any]) -> None:
    """Writes kernels of a Triton cache into an archive, which is replaced as a whole.

    ``facts`` go into its manifest, beside what made the kernels: `unpack` needs "architecture",
    "commit" and "date".
    """
    files = [
        path
        for hash in sorted(hashes)
        for path in sorted((folder / _base32(hash)).iterdir())
        if FILE.fullmatch(_name(path))
    ]
    manifest = json.dumps({**facts, "kernels": len(hashes), "maker": maker()}, indent=2)
    unfinished = archive.with_name(archive.name + ".part")
    with tarfile.open(unfinished, "w:xz") as tar:
        for name, content in (
            (MANIFEST, manifest.encode()),
            *((_name(p), p.read_bytes()) for p in files),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    unfinished.replace(archive)


def unpack(archive: Path, folder: Path, commit: str | None = None) -> str:
    """Makes a Triton cache of an archive, unless its kernels are not for this machine's Triton or
    GPU.

    Says in a sentence what came of it, and whether ``commit``, by default the checkout's, differs
    from that of the kernels. Expects nothing in ``folder``, and writes nothing into it if the
    archive is not used; see `variables` for using it.
    """
    name = archive.name
    try:
        with tarfile.open(archive, "r:xz") as tar:
            contents = {member.name: _read(tar, member) for member in tar}
        manifest = json.loads(contents[MANIFEST])
        made_by, here = {**manifest["maker"], GPU: manifest.get("architecture")}, maker()
        if torch.cuda.is_available():
            here[GPU] = "sm_{}{}".format(*torch.cuda.get_device_capability())
        other = [what for what in here if made_by.get(what) != here[what]]
        if other:
            made, found = (", ".join(f"{n} {m.get(n)}" for n in other) for m in (made_by, here))
            return f"{name} is not used: its kernels are for {made}, here is {found}"
        _write(contents, folder)
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, KeyError, ValueError) as error:
        return f"{name} is not used: it cannot be unpacked ({error or type(error).__name__})"
    number, made_from, date = (manifest[what] for what in ("kernels", "commit", "date"))
    told = f"{number} kernels from {name}, compiled on {date} from commit {made_from}"
    current = commit or environment()["commit"]
    if UNKNOWN in (current, made_from) or current == made_from:
        return told
    return f"{told}, but the code is at {current}: kernels that differ are compiled again"


def _base32(hash: str) -> str:
    """The folder of a kernel in a Triton cache."""
    return base64.b32encode(bytes.fromhex(hash)).decode().rstrip("=")


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _write(contents: Mapping[str, bytes], folder: Path) -> None:
    for name, content in contents.items():
        if FILE.fullmatch(name):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for facts in [path for path in folder.glob("*/*.json") if FILE.fullmatch(_name(path))]:
        files = facts.parent.glob(f"{facts.stem}.*")
        group = {"child_paths": {path.name: str(path.absolute()) for path in files}}
        facts.with_name(f"__grp__{facts.name}").write_text(json.dumps(group))


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise tarfile.ReadError(f"{member.name} is not a file")
    return file.read()
