"""What the stages of a run on a GPU do, as far as it goes without one."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gpu, operators, rehearsal
from bench.floor import Ceilings
from bench.job import Job
from bench.passes import BrokenDevice
from bench.rows import append_rows, read_rows

ROOT = Path(gpu.__file__).parent.parent
RATES = {dtype: Ceilings(1.234e12, 1e11, 1e10) for dtype in gpu.DTYPES}


@pytest.fixture
def job(tmp_path):
    found = Job("again", tmp_path, tmp_path, 100.0, True, None, tmp_path / "gpu-cpu.jsonl")
    found.facts.write_text(json.dumps({"commit": "abc", "tuned": False}))
    return found


def test_every_shape_with_a_target_is_measured_the_most_important_first(job, monkeypatch):
    named = []
    monkeypatch.setattr(gpu, "measure", lambda bench, names: named.extend(names))
    monkeypatch.setattr(gpu, "tuned_architecture", lambda bench: None)
    monkeypatch.setattr(gpu.Bench, "__init__", lambda self, job: vars(self).update(made(job)))
    gpu.again(replace(job, dry=False))
    assert not job.rows.exists()
    shapes = [shape.name for shape in operators.SHAPES]
    assert sorted(named) == sorted([*shapes, *gpu.LAYERS, gpu.HOST])
    assert named[:4] == ["main", "main, gain off", "adjacent", "layer, B = 64"]


def made(job):
    return {"job": job, "dry": job.dry, "facts": {"launch_file": "as shipped"}}


def test_ceilings_survive_their_rows():
    assert gpu.known_ceilings(gpu.ceiling_rows(RATES)) == RATES


def test_rows_say_whether_kernels_were_compiled_meanwhile(job):
    job.compiling.touch()
    bench = gpu.Bench(job)
    job.compiling.unlink()
    for number in range(2):
        bench.keep([{"number": number}])
    rows = read_rows(job.rows)
    assert [row["compiling"] for row in rows] == [True, False]
    assert all((row["stage"], row["commit"]) == ("again", "abc") for row in rows)


def test_a_part_goes_on_where_its_process_died(job, monkeypatch):
    """Of three passes one is timed, and one of the contenders broke the second one."""
    seen = []

    def timed_passes(shape, ceilings, clock, device, seconds, rounds, refused, begin):
        seen.append((shape.name, shape.passes, refused))
        begin("triton", shape.passes[0])
        yield [{"part": "operator", "shape": shape.name, "pass": p} for p in shape.passes]

    monkeypatch.setattr(gpu, "timed_passes", timed_passes)
    stage = {"stage": "main"}
    during = [
        {"part": "main", "contender": "flex", "pass": "backward", "why": "it broke"},
        {"part": "adjacent", "contender": "", "pass": ""},
    ]
    append_rows(
        job.rows,
        [
            {"part": "operator", "shape": "main", "pass": "forward", **stage},
            {"part": "operator", "shape": "main", "pass": "backward", "stage": "again"},
            *({"part": "broken", "outcome": "hung", "during": d, **stage} for d in during),
            *gpu.ceiling_rows(RATES),
        ],
    )
    bench = gpu.Bench(replace(job, stage="main"))
    bench.dry = False
    gpu.measure(bench, ["main", "adjacent", "float32"])
    assert seen == [
        ("main", ("forward + backward", "backward"), {"flex": ("backward", BROKEN)}),
        ("float32", operators.PASSES, {}),
    ]
    noted = json.loads(bench.job.note.read_text())
    assert noted == {"part": "float32", "contender": "triton", "pass": "forward"}
    seen.clear()
    gpu.measure(bench, ["main", "float32"])
    assert seen == []


BROKEN = "its process ended: it broke"


def test_only_what_was_tuned_in_this_run_counts_as_tuned(job):
    pytest.importorskip("triton")
    bench = gpu.Bench(job)
    assert gpu.tuned_architecture(bench) is None
    rehearsal.tune(job)
    path = job.results / "interpreter.json"
    path.write_text(path.read_text().replace('"source": "', '"source": "measured here; '))
    os.utime(path, ns=(0, 0))
    assert gpu.tuned_architecture(bench) is None
    os.utime(path)
    assert gpu.tuned_architecture(bench).source.startswith("measured here; ")
    path.write_text("{")
    assert gpu.tuned_architecture(bench) is None


def test_kernels_that_end_their_process_are_wrong(job, monkeypatch):
    pytest.importorskip("triton")

    def smoke_rows(shape, case, dtype, algorithm, device):
        if shape == "adjacent":
            raise BrokenDevice("RuntimeError: CUDA error: an illegal memory access")
        if shape == "gain off" and algorithm == "resident":
            os._exit(1)
        row = {"part": "smoke", "shape": shape, "dtype": "float32", "outcome": "right"}
        return [{**row, "kernel": kernel} for kernel in gpu.ALGORITHMS[algorithm]]

    monkeypatch.setattr(gpu, "smoke_rows", smoke_rows)
    gpu.smoke(job)
    rows = read_rows(job.rows)
    assert len(rows) == 15
    assert Counter((row["shape"], row.get("why", row["outcome"])) for row in rows) == {
        ("released", "right"): 5,
        ("gain off", "right"): 3,
        ("gain off", "its process died"): 2,
        ("adjacent", "RuntimeError: CUDA error: an illegal memory access"): 5,
    }


WITHOUT_GPU = """
import torch

def refuse(*ignored):
    raise AssertionError("a fork of this process could not use its GPU")

torch._C._cuda_init = torch._C._cuda_getDeviceCount = torch.cuda.device_count = refuse
import bench.gpu
assert not torch.cuda.is_initialized()
"""


def test_what_stages_are_forked_from_has_not_looked_for_a_gpu():
    subprocess.run([sys.executable, "-c", WITHOUT_GPU], cwd=ROOT, check=True)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import bench.__main__, bench.lease
"""


def test_the_process_that_watches_needs_no_pytorch():
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, check=True)


def test_carried_kernels_are_used_if_they_are_for_this_triton(job, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu, "ARCHIVE", tmp_path / "no.tar.xz")
    assert gpu.carried_kernels(job) == "none came with the checkout"
    (tmp_path / "no.tar.xz").write_text("no archive")
    assert gpu.carried_kernels(job).startswith("no.tar.xz is not used: ")
    assert not job.kernels.exists()
