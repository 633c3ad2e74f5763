"""What a run on a GPU measures: the stages of `bench.lease`, each in a process of its own.

A stage reads from the file of rows what was measured before and what broke, and goes on from there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import operators as host
from bench import rehearsal, suite
from bench.ahead import compile_ahead
from bench.floor import Ceilings, measured_ceilings
from bench.forks import in_processes
from bench.job import Job
from bench.kernel_archive import unpack
from bench.kernel_hits import hit_rows
from bench.layers import layer_rows
from bench.no_gpu import why_no_gpu
from bench.operators import ADJACENT, MAIN, OFF, SHAPES, host_rows, timed_passes
from bench.passes import BrokenDevice
from bench.report import report as table_of
from bench.rows import Row, append_rows, whole_rows
from bench.smoke import ALGORITHMS, smoke_rows, wrong_rows
from tokenmix_ops.backends.triton import configs
from tokenmix_ops.testing import Case
from tokenmix_ops.timing import Clock, EventClock, device_name, environment

PASS_SECONDS = 1.2
"""How long each pass of a shape is timed, about."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMOKE = {"released": MAIN, "gain off": replace(MAIN, mixing=OFF)}
SMOKE["adjacent"] = replace(MAIN, mixing=ADJACENT)
LAYERS = {"layer, B = 64": 64, "layer, B = 16": 16}
HOST = "host overhead"
AGAIN = (
    *("main", "main, gain off", "adjacent", "layer, B = 64", "S = 577, gain off", "S = 577"),
    *(HOST, "B = 16"),
)
"""The parts of the last stage that matter most; the others follow."""
ARCHIVE = Path(__file__).parent.parent / "gpu-cache.tar.xz"
"""Where `make gpu-cache` leaves compiled kernels."""


class Bench:
    """What stages measure with: on the GPU, or in a rehearsal on a CPU at tiny sizes."""

    def __init__(self, job: Job) -> None:
        self.job, self.dry = job, job.dry
        self.device = "cpu" if job.dry else "cuda"
        self.clock: Clock = rehearsal.Steps() if job.dry else EventClock()
        self.rounds = 1 if job.dry else None
        self.facts: Row = {**json.loads(job.facts.read_text()), "stage": job.stage}
        self.compiling = job.compiling.exists()
        if job.dry:
            torch.set_num_threads(1)

    def keep(self, rows: Iterable[Row]) -> None:
        """Adds rows to the file, with what is known of this run."""
        assert self.job.rows is not None
        now = self.job.compiling.exists()
        about = {**self.facts, "compiling": self.compiling or now}
        self.compiling = now
        if told := [{**row, **about} for row in rows]:
            append_rows(self.job.rows, told)

    def known(self) -> list[Row]:
        """All rows so far."""
        assert self.job.rows is not None
        return whole_rows(self.job.rows) if self.job.rows.exists() else []

    def note(self, part: str, contender: str = "", of_pass: str = "") -> None:
        """Leaves behind what is about to run."""
        what = {"part": part, "contender": contender, "pass": of_pass}
        self.job.note.write_text(json.dumps(what))

    def case(self, case: Case) -> Case:
        return rehearsal.tiny(case) if self.dry else case

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        # Triton's interpreter cuts bfloat16 off where a GPU rounds it.
        return torch.float16 if self.dry and dtype == torch.bfloat16 else dtype


def look_at_device(job: Job) -> None:
    """Writes what all rows say of the machine and the code."""
    device = "cpu" if job.dry else "cuda"
    if not job.dry and (why := why_no_gpu()):
        job.note.write_text(json.dumps({"why": why}))
        return
    facts = {"suite": "gpu", "device": device_name(device), **environment(device, job.commit)}
    if job.dry:
        facts |= {"rehearsal": True, "triton": version("triton") if find_spec("triton") else None}
    facts |= {"tuned": False, "launch_file": "as shipped", "kernel_cache": carried_kernels(job)}
    unfinished = job.facts.with_suffix(".part")
    unfinished.write_text(json.dumps(facts))
    unfinished.replace(job.facts)


def facts(job: Job) -> None:
    """The state of the machine, and its ceilings."""
    bench = Bench(job)
    row: Row = {"part": "facts", "processors": os.cpu_count()}
    if not bench.dry:
        row["clocks"] = clocks()
    bench.keep([row])
    bench.keep(ceiling_rows(_measure_ceilings(bench)))


def clocks() -> str:
    """What nvidia-smi says of clocks, power and temperature, as they are."""
    asked = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,persistence_mode"
    query = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return "; ".join(done.stdout.strip().splitlines()[:2])


def carried_kernels(job: Job) -> str:
    """Fills the cache of all stages from the archive in the checkout; says what came of it."""
    if find_spec("triton") is None:
        return "no Triton"
    if not ARCHIVE.exists():
        return "none came with the checkout"
    return unpack(ARCHIVE, job.kernels, job.commit)


def _measure_ceilings(bench: Bench) -> dict[torch.dtype, Ceilings]:
    return measured_ceilings(DTYPES, bench.clock, bench.device, 16 if bench.dry else 8192)


def ceiling_rows(ceilings: Mapping[torch.dtype, Ceilings]) -> list[Row]:
    return [
        {
            "part": "ceilings",
            "dtype": str(dtype).removeprefix("torch."),
            "tflops": float(f"{rates.flops / 1e12:.4g}"),
            "terabytes_per_s": float(f"{rates.bytes / 1e12:.4g}"),
            "tera_exponentials_per_s": float(f"{rates.exponentials / 1e12:.3g}"),
        }
        for dtype, rates in ceilings.items()
    ]


def known_ceilings(rows: Sequence[Row]) -> dict[torch.dtype, Ceilings]:
    """The ceilings that `ceiling_rows` wrote."""
    return {
        getattr(torch, row["dtype"]): Ceilings(
            1e12 * row["tflops"],
            1e12 * row["terabytes_per_s"],
            1e12 * row["tera_exponentials_per_s"],
        )
        for row in rows
        if row["part"] == "ceilings"
    }


def smoke(job: Job) -> None:
    """Every kernel against float64, in processes beside each other: most of the time is spent in
    compilers."""
    bench = Bench(job)
    if find_spec("triton") is None:
        bench.keep([{"part": "smoke", "kernel": "all", "outcome": "no Triton"}])
        return
    # Imported once for all of them.
    from tokenmix_ops.backends.triton import launch as launch

    dtypes = (torch.float32,) if bench.dry else (torch.bfloat16, torch.float32)
    tasks = [
        (bench, name, replace(bench.case(case), batch=2), dtype, algorithm)
        for dtype in dtypes
        for name, case in SMOKE.items()
        for algorithm in ALGORITHMS
    ]
    in_processes(_smoke_one, tasks, max(2, (os.cpu_count() or 1) - 2))
    found = [row for row in bench.known() if row["part"] == "smoke"]
    answered = {(row["shape"], row["dtype"], row["kernel"]) for row in found}
    for _, shape, _, dtype, algorithm in tasks:
        lost = wrong_rows(shape, dtype, algorithm, "its process died")
        bench.keep(r for r in lost if (r["shape"], r["dtype"], r["kernel"]) not in answered)


def _smoke_one(bench: Bench, shape: str, case: Case, dtype: torch.dtype, algorithm: str) -> None:
    # Others compute beside it.
    torch.set_num_threads(1)
    try:
        bench.keep(smoke_rows(shape, case, dtype, algorithm, bench.device))
    except BrokenDevice as broken:
        bench.keep(wrong_rows(shape, dtype, algorithm, str(broken)))


def main_shape(job: Job) -> None:
    """The main shape with the shipped launch configurations."""
    measure(Bench(job), ["main"])


def again(job: Job) -> None:
    """Everything, with the launch configurations that were tuned in this run."""
    bench = Bench(job)
    with ExitStack() as until_the_end:
        tuned = tuned_architecture(bench)
        if tuned is not None:
            until_the_end.enter_context(configs.replaced(tuned))
            bench.facts |= {"tuned": True, "launch_file": f"{tuned.name}.json of this run"}
            bench.keep([{"part": "launch file", "source": tuned.source}])
        rest = [name for name in (s.name for s in SHAPES) if name not in AGAIN]
        measure(bench, AGAIN if bench.dry else [*AGAIN, *rest, "layer, B = 16"])


def tuned_architecture(bench: Bench) -> configs.Architecture | None:
    """What the tuner wrote in this run; None if that is nothing."""
    if find_spec("triton") is None:
        return None
    from tokenmix_ops.backends.triton import launch

    own = launch.architecture(torch.device(bench.device))
    path = bench.job.results / f"{own.name}.json"
    started = bench.job.facts.stat().st_mtime_ns
    if not path.exists() or path.stat().st_mtime_ns < started:
        return None
    try:
        return configs.read(path, own.name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path} is not used: {type(error).__name__}: {error}", flush=True)
        return None


def measure(bench: Bench, names: Sequence[str]) -> None:
    """Times the parts of these names; what this stage has timed before, or died of, is left out."""
    rows = [row for row in bench.known() if row.get("stage") == bench.job.stage]
    timed = {(row["shape"], row["pass"]) for row in rows if row["part"] in ("operator", "layer")}
    timed |= {(HOST, row["pass"]) for row in rows if row["part"] == "host"}
    broken = [{"why": row["outcome"], **row["during"]} for row in rows if row["part"] == "broken"]
    ceilings = known_ceilings(bench.known()) or _measure_ceilings(bench)
    for name in names:
        of_part = [found for found in broken if found.get("part") == name]
        # Without a culprit: of a whole part, or of one pass.
        alone = [found for found in of_part if not found.get("contender")]
        if (of_part and name in LAYERS) or any(not found.get("pass") for found in alone):
            continue
        done = {of_pass for shape, of_pass in timed if shape == name}
        done |= {found["pass"] for found in alone}
        bench.note(name)
        start = time.perf_counter()
        for found in _passes(bench, name, ceilings, done, of_part):
            bench.keep(found)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def _passes(
    bench: Bench,
    name: str,
    ceilings: Mapping[torch.dtype, Ceilings],
    done: set[str],
    broken: Sequence[Mapping[str, str]],
) -> Iterator[list[Row]]:
    """Rows of a part, pass by pass."""
    if name in LAYERS or name == HOST:
        if not done:
            yield _host(bench) if name == HOST else _layer(bench, name)
        return
    (shape,) = (shape for shape in SHAPES if shape.name == name)
    # In a rehearsal one stage goes all the way.
    all_passes = ("forward",) if bench.dry and bench.job.stage != "main" else shape.passes
    passes = tuple(of_pass for of_pass in all_passes if of_pass not in done)
    if not passes:
        return
    case, dtype = bench.case(shape.case), bench.dtype(shape.dtype)
    shape = replace(shape, case=case, dtype=dtype, passes=passes)
    refused = {
        found["contender"]: (found["pass"], f"its process ended: {found['why']}")
        for found in broken
    }
    if bench.dry:
        refused["flex"] = ("forward", "nothing is compiled in a rehearsal")
    yield from timed_passes(
        shape,
        ceilings[shape.dtype],
        bench.clock,
        bench.device,
        PASS_SECONDS,
        bench.rounds,
        refused,
        partial(bench.note, name),
    )


def _layer(bench: Bench, name: str) -> list[Row]:
    sizes: dict[str, Any] = {"batch": LAYERS[name]}
    if bench.dry:
        sizes = {"batch": 1, "num_frames": 2, "num_tokens": 4, "num_heads": 1, "dim": 16}
        # Its import would take longer than all the rest.
        sys.modules["transformers"] = None  # type: ignore[assignment]
    backend = "triton" if find_spec("triton") else "eager"
    rows = layer_rows(
        bench.clock,
        bench.device,
        PASS_SECONDS,
        dtype=bench.dtype(torch.bfloat16),
        backend=backend,
        rounds=bench.rounds,
        begin=partial(bench.note, name),
        **sizes,
    )
    return [{"part": "layer", "shape": name, **row} for row in rows]


def _host(bench: Bench) -> list[Row]:
    if bench.dry:
        # This process ends with the stage.
        host.CALLS = host.REPEATS = 1
    return host_rows(bench.clock, bench.device)


def gpu_tests(job: Job) -> None:
    """The tests of the kernels on this GPU; in a rehearsal, a file that has one of each kind."""
    bench = Bench(job)
    told, missing = suite.arguments(suite.TESTS, os.cpu_count() or 1)
    if bench.dry:
        path = job.work / "test_rehearsal.py"
        path.write_text(rehearsal.REHEARSED_TESTS)
        told = [str(path), "--rootdir", str(job.work), "-p", "no:cacheprovider", "--noconftest"]
    if find_spec("pytest") is None:
        bench.keep([{"part": "tests", "failure": "all", "why": "pytest is not installed"}])
        return
    suite.run_tests(told, job.results / "tests.log", bench.keep, missing)


def tune(job: Job) -> None:
    """Tunes this GPU's launch configurations into a file among the results."""
    if job.dry:
        rehearsal.tune(job)
        return
    from bench.__main__ import main

    # The tuner needs a moment to begin, and another to write what it has.
    minutes = max(0.1, (job.seconds - 10) / 60)
    commit = [] if job.commit is None else ["--commit", job.commit]
    main(["tune", "--results", str(job.results), "--minutes", f"{minutes:.2f}", *commit])


def report(job: Job) -> None:
    """What was reached of the targets, and a picture of it."""
    bench = Bench(job)
    bench.keep(hit_rows(job.hits))
    compiled = job.work / "compiled.jsonl"
    if compiled.exists():
        bench.keep(whole_rows(compiled))
    assert job.rows is not None
    print(table_of(job.rows))


STAGES: dict[str, Callable[[Job], None]] = {
    "device": look_at_device,
    "compile": compile_ahead,
    "facts": facts,
    "smoke": smoke,
    "main": main_shape,
    "tests": gpu_tests,
    "tune": tune,
    "again": again,
    "report": report,
    "planted crash": rehearsal.abort,
    "planted half line": rehearsal.half_a_line,
    "planted hang": rehearsal.hang,
    "planted stall": rehearsal.hang,
}
"""By the names that plans use."""
