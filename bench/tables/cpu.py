"""What the result files of a CPU say together: its targets, and the operator shape by shape."""

from __future__ import annotations

from pathlib import Path

from bench.rows import Row, read_rows
from bench.tables.layout import machine
from bench.tables.ratios import shape_lines, target_lines
from bench.targets import Results
from bench.targets_cpu import CPU_TARGETS

SUITES = ("operator", "layer", "tower")


def cpu_table(folder: Path, device: str = "cpu") -> str:
    """From the files of a folder that are named after ``device``; empty if there is none.

    ValueError if they are of more than one machine.
    """
    rows = {
        suite: read_rows(file)
        for suite in SUITES
        if (file := folder / f"{suite}-{device}.jsonl").exists()
    }
    if not rows:
        return ""
    # No table may judge two machines as one.
    where = Results([row for of_suite in rows.values() for row in of_suite]).hardware
    results = {suite: Results(of_suite) for suite, of_suite in rows.items()}
    judged = [(t.target.text, t.target.wanted, t.judge(results)) for t in CPU_TARGETS]
    lines = target_lines(where, judged)
    if "operator" in results:
        lines += ["", *_shapes(where, results["operator"])]
    machines = dict.fromkeys(machine(of_suite[0]) for of_suite in rows.values())
    return "\n".join([*lines, "", f"{ABOUT} {'; '.join(machines)}."])


ABOUT = (
    "B = 2 videos of T = 8 frames of S = 197 tokens, H = 12 heads of 64, float32, gain 0.8, unless "
    "the line says otherwise; × is the speed-up of the C++ kernel, or of layers and towers on it: "
    "median and quartiles of the pairs in each round, contenders in turn. GFLOP/s count the useful "
    "operations; the float32 matrix product has as many (M × 1024 × 1024, smaller a cube) and "
    "takes turns too. Where there is a gain, SDPA gets one set of scaled keys for each frame."
)


def _shapes(where: str, results: Results) -> list[str]:
    def rate(row: Row) -> str:
        return f"{row['gflop'] / row['median_ms'] * 1e3:.0f}"

    def of(product: str, row: Row) -> str:
        found = results.ratio(row["shape"], row["pass"], [product])
        return f"{found.times:.0%}" if found else ""

    def rate_of_product(row: Row) -> str:
        found = results.find(row["shape"], row["pass"], "product")
        return rate(found) if found else ""

    return shape_lines(
        where,
        results,
        {
            "C++, ms": lambda row: f"{row['median_ms']:.3g}",
            "GFLOP/s": rate,
            "matrix product, GFLOP/s": rate_of_product,
            "of it": lambda row: of("product", row),
            "of its own two products": lambda row: of("own_products", row),
        },
    )
