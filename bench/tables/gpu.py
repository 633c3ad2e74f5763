"""What a run on a GPU measured, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from bench.rows import Row
from bench.tables.layout import line, reasons
from bench.tables.ratios import shape_lines, target_lines
from bench.targets import TARGETS, Results, order
from tokenmix_ops.peer_layers import LAYER_TITLES


def gpu_table(rows: Sequence[Row]) -> str:
    """The GPU suite as Markdown: targets, shapes, layers, the host, what did not run, and where.

    ValueError if the rows are of more than one card.
    """
    results = Results(rows)
    rehearsed = any(row.get("rehearsal") for row in rows)
    judged = ((target.text, target.wanted, target.judge(results)) for target in TARGETS)
    lines = target_lines(results.hardware, judged, claims=not rehearsed)
    lines += ["", *_shapes(results), "", *_gpu_layers(results), "", *_host_line(results)]
    lines += [*reasons(results), "", REHEARSED if rehearsed else _where(results)]
    return "\n".join(lines)


REHEARSED = (
    "A rehearsal on a CPU: every shape is tiny, and times are made up, a second for each call. "
    "Nothing here was measured."
)


def _shapes(results: Results) -> list[str]:
    def of_floor(row: Row) -> str:
        return f"{results.fraction(row['shape'], row['pass']):.0%}"

    return shape_lines(
        results.hardware,
        results,
        {"Triton, ms": lambda row: f"{row['median_ms']:.3g}", "of the floor": of_floor},
    )


def _gpu_layers(results: Results) -> list[str]:
    others = ("spatial_sdpa", "naive_gather", "blip")
    titles = [f"against {LAYER_TITLES[name]}" for name in others]
    lines = [line(f"one layer with its projections, on {results.hardware}", "pass", "ms", *titles)]
    lines.append("|---|---|---:|" + "---:|" * len(others))
    for shape, of_pass in order(results.part("layer")):
        for name in ("token_mixing", "token_mixing_gain_off"):
            row = results.find(shape, of_pass, name)
            if row is not None:
                ratios = [results.ratio(shape, of_pass, [other], name) for other in others]
                cells = " | ".join(str(found or "") for found in ratios)
                title = f"{LAYER_TITLES[name]}, {shape.removeprefix('layer, ')}"
                lines.append(f"| {title} | {of_pass} | {row['median_ms']:.3g} | {cells} |")
    return lines


def _host_line(results: Results) -> list[str]:
    times = [
        f"{row['contender']}, {row['pass']} {row['median_us']:.1f}"
        for row in results.part("host")
        if "median_us" in row
    ]
    of_call = f"Microseconds of the host for a call, beside {results.hardware}"
    return [f"{of_call}: {'; '.join(times)}.", ""] if times else []


def _where(results: Results) -> str:
    row = results.rows[0]
    counted = [r for r in results.part("tests") if "passed" in r]
    tests = (
        "; tests there: {passed} passed, {failed} failed, {skipped} skipped".format(**counted[-1])
        if counted
        else ""
    )
    rates = [f"{r['tflops']:.0f} TFLOP/s in {r['dtype']}" for r in results.part("ceilings")]
    copied = next((r["terabytes_per_s"] for r in results.part("ceilings")), None)
    measured = f"copy {copied:.2f} TB/s, matrix product {', '.join(rates)}; " if rates else ""
    return (
        "B = 64 videos of T = 8 frames of S = 197 tokens, H = 12 heads of 64, bfloat16, gain 0.8, "
        "unless the shape says otherwise; × is the Triton backend's speed-up, median of "
        "the pairs in each round, contenders in turn on rotating inputs. Where there is a gain, "
        "fused attention that knows none gets one set of scaled keys for each frame. Floors follow "
        f"from the ceilings of the same run: {measured}{row['hardware']}, driver {row['driver']}, "
        f"CUDA {row['cuda']}, cuDNN {row['cudnn']}, PyTorch {row['torch']}, Triton "
        f"{row['triton']}, tokenmix_ops {row['tokenmix_ops']} at {row['commit']}, "
        f"{row['date']}{tests}."
    )
