"""What rows of a run on a GPU say, in a few lines and without PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from bench.rows import Row

FAILURES = 12
"""So many failed tests are named."""


def summary(rows: Sequence[Row]) -> str:
    """A line or two for each part that the rows are about."""
    lines: list[str] = []
    for part in dict.fromkeys(row["part"] for row in rows):
        if part in PARTS:
            lines += PARTS[part]([row for row in rows if row["part"] == part])
    return "\n".join(lines)


def _facts(rows: Sequence[Row]) -> Iterator[str]:
    names = ("hardware", "driver", "cuda", "torch", "triton", "commit", "clocks", "kernel_cache")
    for row in rows:
        yield ", ".join(f"{name} {row[name]}" for name in names if name in row)


def _ceilings(rows: Sequence[Row]) -> Iterator[str]:
    rates = ", ".join(f"{row['tflops']:g} TFLOP/s in {row['dtype']}" for row in rows)
    yield f"copy {rows[0]['terabytes_per_s']:g} TB/s, matrix product {rates}"


def _smoke(rows: Sequence[Row]) -> Iterator[str]:
    counted = Counter(row["outcome"] for row in rows)
    yield "smoke: " + ", ".join(f"{number} {outcome}" for outcome, number in counted.items())
    for row in rows:
        if row["outcome"] == "wrong":
            yield f"  {row['kernel']}, {row['shape']}, {row['dtype']}: {row['why']}"


def _tests(rows: Sequence[Row]) -> Iterator[str]:
    counts = [row for row in rows if "passed" in row]
    if counts:
        found = ", ".join(f"{counts[-1][name]} {name}" for name in ("passed", "failed", "skipped"))
        yield f"tests: {found}{'' if counts[-1]['finished'] else ', not finished'}"
    failed = [f"  {row['failure']}: {row['why']}" for row in rows if "failure" in row]
    yield from failed[:FAILURES]
    if len(failed) > FAILURES:
        yield f"  and {len(failed) - FAILURES} more"


def _launch_file(rows: Sequence[Row]) -> Iterator[str]:
    yield f"launch configurations: {rows[-1]['launch_file']}, {rows[-1]['source']}"


def _timed(rows: Sequence[Row]) -> Iterator[str]:
    """Milliseconds of a pass, the fastest first, and who did not take part."""
    for shape, of_pass in dict.fromkeys((row["shape"], row["pass"]) for row in rows):
        race = [row for row in rows if (row["shape"], row["pass"]) == (shape, of_pass)]
        times = sorted((row for row in race if "median_ms" in row), key=lambda r: r["median_ms"])
        cells = [f"{row['contender']} {row['median_ms']:g}" for row in times]
        if len(race) > len(times):
            cells.append(f"{len(race) - len(times)} not run")
        if floors := [row["floor_ms"] for row in race if "floor_ms" in row]:
            cells.append(f"floor {floors[0]:g}")
        yield f"{shape}, {of_pass}, ms: {', '.join(cells)}"
        for row in race:
            if row["contender"] == "triton" and "reason" in row:
                yield f"  triton: {row['reason'][:200]}"


def _host(rows: Sequence[Row]) -> Iterator[str]:
    times = [f"{r['contender']}, {r['pass']} {r['median_us']:g}" for r in rows if "median_us" in r]
    yield f"host, µs: {'; '.join(times)}"


def _compiled(rows: Sequence[Row]) -> Iterator[str]:
    failed = [f"{row['what']}: {row['why']}" for row in rows if "why" in row]
    yield f"compiled beforehand: {len(rows)}, {len(failed)} of them failed"
    yield from (f"  {text[:200]}" for text in failed)


def _kernels(rows: Sequence[Row]) -> Iterator[str]:
    yield "our kernels, tests apart: {found} found compiled, {compiled} compiled".format(**rows[-1])


PARTS: dict[str, Callable[[Sequence[Row]], Iterator[str]]] = {
    "facts": _facts,
    "ceilings": _ceilings,
    "smoke": _smoke,
    "tests": _tests,
    "launch file": _launch_file,
    "operator": _timed,
    "layer": _timed,
    "host": _host,
    "compiled": _compiled,
    "kernels": _kernels,
}
