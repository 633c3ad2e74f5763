"""The benchmark of a CUDA GPU in one command: the tests first, then every figure that has a target.

    python -m tokenmix_ops.bench.gpu --out DIR

DIR gets the rows of data, gpu-<device>.jsonl, a picture of them, and the log of the tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from tokenmix_ops.bench.floor import Ceilings, measured_ceilings
from tokenmix_ops.bench.gpu_table import draw, gpu_table
from tokenmix_ops.bench.host_overhead import host_rows
from tokenmix_ops.bench.measure import Clock, EventClock, gpu_environment, slug
from tokenmix_ops.bench.operator_suite import SHAPES, operator_rows
from tokenmix_ops.bench.render import write_rows
from tokenmix_ops.bench.suites import Row
from tokenmix_ops.bench.whole_layer import layer_rows

ROOT = Path(__file__).parent.parent.parent
PASS_SECONDS = 1.2
"""How long each pass of a shape is timed, about."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Part = Callable[[], list[Row]]


def run_tests(log: Path) -> bool:
    """Runs the whole test suite on this device, its output shown and kept; whether it is green."""
    command = [sys.executable, "-m", "pytest", "tests"]
    # One worker a core: most of the time goes into compiling kernels.
    command += ["-n", "auto"] if find_spec("xdist") else []
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    environment["PYTHONPATH"] = path
    with log.open("w") as kept:
        running = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert running.stdout is not None
        for line in running.stdout:
            kept.write(line)
            kept.flush()
            print(line, end="", flush=True)
        return running.wait() == 0


def parts(
    ceilings: dict[torch.dtype, Ceilings], clock: Clock, device: str
) -> Iterator[tuple[str, Part]]:
    """What is measured, by name, the most important first."""
    of_layer = partial(layer_rows, clock, device, PASS_SECONDS)
    for shape in SHAPES:
        rates = ceilings[shape.dtype]
        yield shape.name, partial(operator_rows, shape, rates, clock, device, PASS_SECONDS)
        if shape.name == "adjacent":
            yield "layer, B = 64", partial(of_layer, batch=64)
            yield "host overhead", partial(host_rows, clock, device)
    yield "layer, B = 16", partial(of_layer, batch=16)


def measure(
    named_parts: Iterable[tuple[str, Part]], seconds: float, keep: Callable[[list[Row]], object]
) -> list[str]:
    """Runs parts until the time is up, and hands each one's rows to ``keep``; names what could not
    be measured, with the reason."""
    left_out = []
    start = time.monotonic()
    for name, part in named_parts:
        begin = time.monotonic()
        if begin - start > seconds:
            left_out.append(f"{name}: the time was up")
            continue
        outcome = "done"
        try:
            keep(part())
        # One part that breaks must not cost the others' figures.
        except Exception as error:
            traceback.print_exc()
            outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            left_out.append(f"{name}: {outcome}")
        now = time.monotonic()
        left = max(0, seconds - (now - start))
        print(f"{name}: {outcome}, {now - begin:.0f} s; {left:.0f} s left", flush=True)
    return left_out


def ceiling_rows(ceilings: dict[torch.dtype, Ceilings]) -> list[Row]:
    return [
        {
            "suite": "gpu",
            "part": "ceilings",
            "dtype": str(dtype).removeprefix("torch."),
            "tflops": round(rates.flops / 1e12, 1),
            "terabytes_per_s": round(rates.bytes / 1e12, 3),
            "tera_exponentials_per_s": round(rates.exponentials / 1e12, 2),
        }
        for dtype, rates in ceilings.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tokenmix_ops.bench.gpu",
        description="Tests on this GPU, then measures the operator and the layer on it.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, picture and log")
    parser.add_argument("--skip-tests", action="store_true", help="for reruns; the rows say so")
    parser.add_argument(
        "--seconds", type=float, default=330, help="for measuring, the tests not counted (330)"
    )
    parser.add_argument("--commit", help="what is measured, where the checkout does not say it")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("tokenmix_ops.bench.gpu: needs a CUDA GPU, and this machine has none")
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "tests.log"
    if not options.skip_tests and not run_tests(log):
        sys.exit(f"tokenmix_ops.bench.gpu: the tests fail, so nothing is measured; see {log}")
    about = {
        **gpu_environment(options.commit),
        "device": slug(torch.cuda.get_device_name()),
        "tests": "skipped" if options.skip_tests else "passed",
    }
    path = options.out / f"gpu-{about['device']}.jsonl"
    rows: list[Row] = []

    def keep(measured: list[Row]) -> None:
        rows.extend({**row, **about} for row in measured)
        write_rows(path, rows)

    clock = EventClock()
    ceilings = measured_ceilings(DTYPES, clock)
    keep(ceiling_rows(ceilings))
    left_out = measure(parts(ceilings, clock, "cuda"), options.seconds, keep)
    print(gpu_table(rows))
    if find_spec("matplotlib"):
        draw(rows, path.with_suffix(".png"))
    print(f"\nrows: {path}")
    if left_out:
        sys.exit("tokenmix_ops.bench.gpu: not measured: " + "; ".join(left_out))


if __name__ == "__main__":
    main()
