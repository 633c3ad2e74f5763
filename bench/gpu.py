"""Everything about a CUDA GPU in one run: the tests first, then each figure that has a target."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.floor import Ceilings
from bench.layers import layer_rows
from bench.operators import SHAPES, host_rows, operator_rows
from bench.passes import Part
from bench.rows import Row
from bench.targets import OTHERS, Results, order
from tokenmix_ops.timing import Clock

ROOT = Path(__file__).parent.parent
PASS_SECONDS = 1.2
"""How long each pass of a shape is timed, about."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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

    def of_layer(batch: int) -> list[Row]:
        about = {"suite": "gpu", "part": "layer", "shape": f"layer, B = {batch}"}
        return [{**about, **row} for row in layer_rows(clock, device, PASS_SECONDS, batch=batch)]

    for shape in SHAPES:
        rates = ceilings[shape.dtype]
        yield shape.name, partial(operator_rows, shape, rates, clock, device, PASS_SECONDS)
        if shape.name == "adjacent":
            yield "layer, B = 64", partial(of_layer, batch=64)
            yield "host overhead", partial(host_rows, clock, device)
    yield "layer, B = 16", partial(of_layer, batch=16)


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


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of how many times faster the Triton backend is, by shape and contender."""
    from matplotlib.figure import Figure

    results = Results(rows)
    timed = order(results.part("operator"))
    passes = ("forward", "forward + backward")
    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, of_pass in zip(figure.subplots(len(passes), 1), passes, strict=True):
        shapes = [shape for shape, its_pass in timed if its_pass == of_pass]
        width = 0.8 / len(OTHERS)
        for number, (title, names) in enumerate(OTHERS.items()):
            bars = [
                (place + number * width, found.times)
                for place, shape in enumerate(shapes)
                if (found := results.ratio(shape, of_pass, names))
            ]
            heights = [times for _, times in bars]
            axes.bar([x for x, _ in bars], heights, width, label=title, color=f"C{number}")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_yscale("log")
        labels = [shape.replace(", ", ",\n") for shape in shapes]
        axes.set_xticks([place + 0.4 - width / 2 for place in range(len(shapes))], labels)
        axes.set_ylabel("times faster")
        axes.set_title(f"{of_pass}: the Triton backend against")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(OTHERS))
    figure.suptitle(rows[0]["hardware"])
    figure.savefig(path, dpi=120)
