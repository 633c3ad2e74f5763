"""A few lines say what a stage found."""

from bench.summary import FAILURES, summary

OPERATOR = {"part": "operator", "shape": "main", "pass": "forward", "floor_ms": 0.1}
ROWS = [
    {"part": "facts", "hardware": "NVIDIA H100", "driver": "580", "suite": "gpu"},
    {"part": "ceilings", "dtype": "bfloat16", "tflops": 700.0, "terabytes_per_s": 2.9},
    {"part": "smoke", "outcome": "right"},
    {
        "part": "smoke",
        "outcome": "wrong",
        "kernel": "bwd_key",
        "shape": "adjacent",
        "dtype": "float32",
        "why": "value gradient: 3 elements too far off",
    },
    {"part": "launch file", "launch_file": "sm_90.json of this run", "source": "measured"},
    {**OPERATOR, "contender": "flex", "median_ms": 0.5},
    {**OPERATOR, "contender": "sdpa_flash", "reason": "has no way to apply the gain"},
    {**OPERATOR, "contender": "eager", "median_ms": 0.25},
    {**OPERATOR, "contender": "triton", "reason": "its process ended: it hung"},
    {"part": "stage", "outcome": "done"},
]
LINES = """\
hardware NVIDIA H100, driver 580
copy 2.9 TB/s, matrix product 700 TFLOP/s in bfloat16
smoke: 1 right, 1 wrong
  bwd_key, adjacent, float32: value gradient: 3 elements too far off
launch configurations: sm_90.json of this run, measured
main, forward, ms: eager 0.25, flex 0.5, 2 not run, floor 0.1
  triton: its process ended: it hung"""


def test_each_part_has_its_line():
    assert summary(ROWS) == LINES
    assert summary([]) == ""


def test_counts_are_the_last_ones_and_failures_few():
    counts = {"part": "tests", "failed": 20, "skipped": 1}
    rows = [{"part": "tests", "failure": f"test_{n}", "why": "no"} for n in range(20)]
    rows += [{**counts, "passed": n, "finished": False} for n in (100, 200)]
    first, *named, last = summary(rows).splitlines()
    assert first == "tests: 200 passed, 20 failed, 1 skipped, not finished"
    assert named == [f"  test_{n}: no" for n in range(FAILURES)]
    assert last == f"  and {20 - FAILURES} more"


def test_the_host_and_what_was_compiled():
    host = {"part": "host", "pass": "no autograd"}
    compiled = {"part": "compiled", "seconds": 3.0}
    rows = [
        {**host, "contender": "triton", "median_us": 14.2},
        {**host, "contender": "eager", "reason": "out of memory"},
        {**compiled, "what": "triton: main"},
        {**compiled, "what": "flex, forward: main", "why": "no memory"},
        {"part": "kernels", "found": 600, "compiled": 3},
    ]
    assert summary(rows).splitlines() == [
        "host, µs: triton, no autograd 14.2",
        "compiled beforehand: 2, 1 of them failed",
        "  flex, forward: main: no memory",
        "our kernels, tests apart: 600 found compiled, 3 compiled",
    ]
