"""The command ``python -m bench NAME``: each subcommand parses its arguments and runs a benchmark.

What a benchmark needs is imported when it runs, so that the others work where that is missing.
"""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from bench.rows import Keeper, Row, compare, read_rows, update_rows

PAGES = (Path("README.md"), Path("results/README.md"))
METHODS = (
    *("token_mixing (P)", "spatial (P)", "st_adapter", "temporal"),
    *("token_mixing (F)", "spatial (F)"),
)
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
KERNELS = ("fwd_streamed", "fwd_resident", "bwd_query", "bwd_key", "bwd_resident")
"""Known here too, because --help must not import what they are from."""


def _operator(given: Namespace) -> None:
    from bench.floor import measured_ceilings
    from bench.operators import CPU_SHAPES, SHAPES, Shape, operator_rows
    from bench.passes import run_parts
    from tokenmix_ops.timing import clock_of

    _need_device(given)
    clock = clock_of(given.device)
    shapes = CPU_SHAPES if given.device == "cpu" else SHAPES
    chosen = [shape for shape in shapes if given.shapes is None or shape.name in given.shapes]
    if not chosen:
        _stop(given, f"expected shapes among {', '.join(s.name for s in shapes)}")
    dtypes = tuple(dict.fromkeys(shape.dtype for shape in chosen))
    size = 1024 if given.device == "cpu" else 8192
    ceilings = measured_ceilings(dtypes, clock, given.device, size)
    keep = _keeper(given, "operator")

    def part(shape: Shape) -> list[Row]:
        rates = ceilings[shape.dtype]
        return operator_rows(shape, rates, clock, given.device, given.seconds)

    parts = [(shape.name, partial(part, shape)) for shape in chosen]
    _finish(given, keep, run_parts(parts, float("inf"), keep))


def _layer(given: Namespace) -> None:
    import torch

    from bench.layers import layer_rows
    from bench.passes import run_parts
    from tokenmix_ops.timing import clock_of

    on_cpu = given.device == "cpu"
    batch = given.batch or (2 if on_cpu else 64)
    keep = _keeper(given, "layer")

    def part() -> list[Row]:
        return layer_rows(
            clock_of(given.device),
            given.device,
            1.2,
            batch=batch,
            dtype=torch.float32 if on_cpu else torch.bfloat16,
            backend="eager" if on_cpu else "triton",
            rounds=given.rounds,
        )

    _finish(given, keep, run_parts([(f"layer, B = {batch}", part)], float("inf"), keep))


def _host(given: Namespace) -> None:
    from bench.operators import host_rows
    from tokenmix_ops.timing import clock_of

    keep = _keeper(given, "host")
    backend = "eager" if given.device == "cpu" else "triton"
    keep(host_rows(clock_of(given.device), given.device, backend))
    _finish(given, keep, [])


def _gpu(given: Namespace) -> None:
    from importlib.util import find_spec

    from bench.floor import measured_ceilings
    from bench.gpu import DTYPES, ceiling_rows, draw, parts, run_tests
    from bench.passes import run_parts
    from tokenmix_ops.timing import clock_of

    given.device = "cuda"
    tests = "skipped" if given.skip_tests else "passed"
    keep = _keeper(given, "gpu", tests=tests)
    given.results.mkdir(parents=True, exist_ok=True)
    log = given.results / "tests.log"
    if not given.skip_tests and not run_tests(log):
        _stop(given, f"the tests fail, so nothing is measured; see {log}")
    clock = clock_of("cuda")
    ceilings = measured_ceilings(DTYPES, clock)
    keep(ceiling_rows(ceilings))
    left_out = run_parts(parts(ceilings, clock, "cuda"), given.seconds, keep)
    if find_spec("matplotlib"):
        draw(keep.rows, keep.path.with_suffix(".png"))
    _finish(given, keep, left_out)


def _training(given: Namespace) -> None:
    import torch

    from bench.passes import run_parts
    from bench.training import SIZES, parts
    from tokenmix_ops.timing import clock_of

    precision = torch.get_float32_matmul_precision()
    keep = _keeper(given, "training", float32_matmul_precision=precision)
    named = parts(given.device, SIZES[given.device], clock_of(given.device))
    _finish(given, keep, run_parts(named, given.seconds, keep))


def _memory(given: Namespace) -> None:
    from bench.memory import memory_row
    from bench.training import Size, all_runs
    from tokenmix_ops.timing import environment

    machine = {k: v for k, v in environment().items() if k not in ("hardware", "threads")}
    facts = {"hardware": "none: fake tensors", **machine}
    keep = Keeper(given.results / "memory-fake.jsonl", facts)
    for run in all_runs():
        keep([memory_row(run, Size())])
        print(f"{run}: {keep.rows[-1]['peak_gib']} GiB", flush=True)
    _finish(given, keep, [])


def _rerank(given: Namespace) -> None:
    import torch

    from bench.rerank import rerank_rows
    from tokenmix_ops.timing import device_name

    _need_device(given)
    keep = Keeper(given.results / f"rerank-{device_name(given.device)}.jsonl", {})
    rows = rerank_rows(
        videos=given.videos,
        texts=given.texts,
        texts_at_once=given.texts_at_once,
        rounds=given.rounds,
        device=given.device,
        dtype=getattr(torch, given.dtype),
        progress=lambda done: print(f"round {done}", flush=True),
    )
    keep(rows)
    _finish(given, keep, [])


def _loading(given: Namespace) -> None:
    from tempfile import TemporaryDirectory

    from bench.loading import loading_rows

    keep = Keeper(given.results / "loading-cpu.jsonl", {})
    if given.names < 12:
        _stop(given, f"expected at least 12 for --names, got {given.names}")
    with TemporaryDirectory() as folder:
        for row in loading_rows(
            Path(folder),
            clips=given.clips,
            names=given.names,
            rounds=given.rounds,
            progress=partial(print, flush=True),
        ):
            keep([row])
    _finish(given, keep, [])


def _world(given: Namespace) -> None:
    from rich.console import Console

    from bench.tables import world_table
    from bench.world import World, measure

    sizes = ("clips", "stills", "still_epochs", "still_learning_rate", "epochs", "learning_rate")
    chosen = {name: vars(given)[name] for name in (*sizes, "seed") if name in given}
    path = given.results / "world-cpu.jsonl"
    rows: list[Row] = []
    console = Console(highlight=False)
    for row in measure(given.work, World(**chosen), given.contenders, given.tasks, console):
        shown = {k: round(v, 1) for k, v in row.items() if isinstance(v, float)}
        console.print(f"{row['task']}, {row['contender']}: {shown}")
        # Rows of other contenders stay.
        rows = update_rows(path, [row], ("task", "contender"))
    print(f"{world_table(rows)}\n\nrows: {path}")


def _search(given: Namespace) -> None:
    from bench.search_world import measure
    from bench.tables import search_table

    path = given.results / "search-cpu.jsonl"
    found = measure(given.checkpoint, given.work, given.clips, given.rerank, given.seed)
    # Rows of other retrievers stay.
    rows = update_rows(path, found, ("checkpoint", "rerank"))
    print(f"{search_table(rows)}\n\nrows: {path}")


def _aot(given: Namespace) -> None:
    from bench.aot import SHIPPED, all_cases, compile_all, problems

    def progress(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\rcompiled {done} of {total} kernels", end=end, file=sys.stderr, flush=True)

    keep = Keeper(given.results / "aot.jsonl", {})
    cases = all_cases(given.architectures or SHIPPED, given.head_dims, given.dtypes)
    keep(compile_all(cases, progress))
    _finish(given, keep, [])
    if found := problems(keep.rows):
        _stop(given, "\n".join(["problems:", *found]))


def _tune(given: Namespace) -> None:
    import shutil
    from importlib.util import find_spec

    given.device = "cuda"
    _need_device(given)
    if find_spec("triton") is None:
        _stop(given, "needs Triton: pip install 'tokenmix_ops[triton]'")
    from bench.tune import tune_this_gpu

    try:
        path = tune_this_gpu(given.kernels, given.minutes)
    except RuntimeError as error:
        _stop(given, str(error))
    print(f"written: {path}")
    if given.results is not None:
        given.results.mkdir(parents=True, exist_ok=True)
        print(f"copied: {shutil.copy(path, given.results)}")


def _render(given: Namespace) -> None:
    from bench.render import update

    try:
        update(given.pages, given.results, given.check)
    except (ValueError, OSError) as error:
        _stop(given, str(error))


def _compare(given: Namespace) -> None:
    try:
        print(compare(read_rows(given.old), read_rows(given.new)))
    except (ValueError, OSError) as error:
        _stop(given, str(error))


def _stop(given: Namespace, sentence: str) -> NoReturn:
    sys.exit(f"bench {given.name}: {sentence}")


def _need_device(given: Namespace) -> None:
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        _stop(given, "needs a CUDA GPU, and this machine has none")


def _keeper(given: Namespace, suite: str, **facts: object) -> Keeper:
    """Keeps a suite's rows with the facts of this run in a file named after the device."""
    from tokenmix_ops.timing import device_name, environment

    _need_device(given)
    device = device_name(given.device)
    about = {"device": device, **environment(given.device, given.commit), **facts}
    return Keeper(given.results / f"{suite}-{device}.jsonl", {"suite": suite, **about})


def _finish(given: Namespace, keep: Keeper, left_out: Sequence[str]) -> None:
    """Prints the table of what was kept; exit status 1 if something could not be measured."""
    from bench.tables import TABLES

    if keep.rows:
        print(TABLES[given.name](keep.rows))
        print(f"\nrows: {keep.path}; python -m bench render puts them into the pages")
    if left_out:
        _stop(given, f"not measured: {'; '.join(left_out)}")


def parser() -> ArgumentParser:
    """Of the whole command."""
    whole = ArgumentParser(
        prog="python -m bench",
        description="Measures, renders what was measured, and compares measurements.",
        epilog="Each subcommand has --help with an example.",
    )
    subcommands = whole.add_subparsers(dest="name", required=True, metavar="NAME")

    def add(
        name: str, run: Callable[[Namespace], None], text: str, example: str, results: bool = True
    ) -> ArgumentParser:
        found = subcommands.add_parser(
            name,
            help=text[0].lower() + text[1:].split(".")[0],
            description=text,
            epilog=f"Example: python -m bench {name} {example}".strip(),
        )
        found.set_defaults(run=run)
        if results:
            found.add_argument(
                "--results", type=Path, default=Path("results"), help="folder of rows (%(default)s)"
            )
        return found

    def device(found: ArgumentParser, default: str) -> None:
        found.add_argument(
            "--device", choices=("cuda", "cpu"), default=default, help="(%(default)s)"
        )

    def commit(found: ArgumentParser) -> None:
        found.add_argument("--commit", help="what is measured, where the checkout does not say it")

    def number(found: ArgumentParser, flag: str, default: float | None, text: str) -> None:
        kind = type(default) if default is not None else int
        text += "" if default is None else " (%(default)s)"
        found.add_argument(flag, type=kind, default=default, metavar="N", help=text)

    found = add("operator", _operator, "Times the operator against its peers.", "--shapes main")
    device(found, "cuda")
    found.add_argument("--shapes", nargs="+", metavar="NAME", help="only these")
    number(found, "--seconds", 1.2, "how long each pass is timed, about")
    commit(found)
    found = add(
        "layer",
        _layer,
        "Times a whole attention layer against the one it replaces.",
        "--device cpu --rounds 61",
    )
    device(found, "cuda")
    number(found, "--batch", None, "videos; 64 on a GPU, 2 on a CPU")
    number(found, "--rounds", None, "how often each layer runs; otherwise for about 1.2 s")
    commit(found)
    found = add("host", _host, "Times what the host spends on one call.", "--device cpu")
    device(found, "cuda")
    commit(found)
    found = add(
        "gpu",
        _gpu,
        "Runs the tests on this GPU, then operator, layer and host within a time budget.",
        "--results out --skip-tests --seconds 300",
    )
    found.add_argument("--skip-tests", action="store_true", help="for reruns; the rows say so")
    number(found, "--seconds", 330.0, "for measuring, the tests not counted")
    commit(found)
    found = add(
        "training",
        _training,
        "Times fine-tuning by every method against the authors' way of computing.",
        "--device cpu",
    )
    device(found, "cuda")
    number(found, "--seconds", 480.0, "for all of it")
    commit(found)
    add(
        "memory",
        _memory,
        "Works out the memory of fine-tuning by every method, with no GPU. Takes minutes.",
        "--results /tmp/results",
    )
    found = add(
        "rerank",
        _rerank,
        "Times re-ranking with a video's keys and values computed once.",
        "--texts 32",
    )
    device(found, "cpu")
    found.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="(%(default)s)"
    )
    number(found, "--videos", 1, "videos that texts are matched with")
    number(found, "--texts", 128, "texts for each video")
    number(found, "--texts-at-once", 16, "bounds the memory")
    number(found, "--rounds", 3, "how often each way runs")
    found = add(
        "loading",
        _loading,
        "Measures how fast videos are read for training, and in how much memory.",
        "--clips 1000",
    )
    number(found, "--clips", 10_000, "clips to read for memory")
    number(found, "--names", 48, "clips to time in a round")
    number(found, "--rounds", 3, "how often each way of reading runs")
    found = add(
        "world",
        _world,
        "Tunes the methods on the small video world, and measures what each learns.",
        '--contenders "token_mixing (P)" "spatial (P)"',
    )
    found.add_argument(
        "--work", type=Path, default=Path("runs/world"), help="trainings; they resume (%(default)s)"
    )
    found.add_argument(
        "--contenders",
        nargs="+",
        choices=METHODS,
        default=METHODS,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)} (all)",
    )
    tasks = ("captioning", "retrieval")
    found.add_argument("--tasks", nargs="+", choices=tasks, default=tasks, help="(both)")
    for flag, kind, text in (
        ("--clips", int, "clips that move"),
        ("--stills", int, "clips whose single frames are learnt first"),
        ("--still-epochs", int, "epochs on still frames"),
        ("--still-learning-rate", float, "highest learning rate on them"),
        ("--epochs", int, "epochs of each method"),
        ("--learning-rate", float, "highest learning rate of each method"),
        ("--seed", int, "of the world and of the training"),
    ):
        found.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar="N", help=text)
    found = add(
        "search",
        _search,
        "Searches new clips of the small video world by their captions.",
        "runs/world/retrieval/token_mixing-F",
    )
    found.add_argument(
        "checkpoint",
        nargs="?",
        default="runs/world/retrieval/token_mixing-F",
        help="a retriever of that world, or its folder (%(default)s)",
    )
    found.add_argument(
        "--work", type=Path, default=Path("runs/search"), help="clips and indexes (%(default)s)"
    )
    number(found, "--clips", 200, "clips to search; more than two parts of an index, 64")
    number(found, "--rerank", 20, "candidates that the matching head ranks, in the second row")
    number(found, "--seed", 5000, "of the clips; training used another one")
    found = add(
        "aot",
        _aot,
        "Compiles every Triton kernel with no GPU and reports what came out. Exit status 1 if a "
        "kernel does not compile, is empty, does not fit, spills at head_dim 64 or has no matrix "
        "instructions.",
        "--architectures sm_86 sm_120 --results /tmp/results",
    )
    found.add_argument(
        "--architectures",
        nargs="+",
        choices=ARCHITECTURES,
        metavar="NAME",
        help=f"of {', '.join(ARCHITECTURES)}; all with a launch file of their own by default, "
        "the others use the default one",
    )
    found.add_argument(
        "--head-dims",
        nargs="+",
        type=int,
        choices=range(1, 257),
        default=(64, 128),
        metavar="N",
        help="at most 256 (64 128)",
    )
    all_dtypes = ("float16", "bfloat16", "float32")
    found.add_argument("--dtypes", nargs="+", choices=all_dtypes, default=all_dtypes, help="(all)")
    found = add(
        "tune",
        _tune,
        "Measures launch configurations on this GPU and writes them into the package.",
        "--minutes 4 --kernels fwd_resident",
        results=False,
    )
    found.add_argument(
        "--kernels",
        nargs="+",
        choices=KERNELS,
        default=KERNELS,
        metavar="NAME",
        help=f"of {', '.join(KERNELS)} (all)",
    )
    number(found, "--minutes", 8.0, "time limit")
    found.add_argument("--results", type=Path, help="folder that gets a copy of the written file")
    found = add(
        "render", _render, "Fills the rendered blocks of pages without measuring.", "--check"
    )
    found.add_argument(
        "--pages",
        nargs="+",
        type=Path,
        default=[Path(p) for p in PAGES],
        help="(README.md results/README.md)",
    )
    found.add_argument("--check", action="store_true", help="change nothing; fail if one differs")
    found = add(
        "compare",
        _compare,
        "Sets two result files side by side: the ratio of medians, old over new.",
        "old/gpu-h100.jsonl new/gpu-h100.jsonl",
        results=False,
    )
    found.add_argument("old", type=Path, help="a result file")
    found.add_argument("new", type=Path, help="another one of the same kind")
    return whole


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    try:
        given.run(given)
    except ModuleNotFoundError as error:
        _stop(given, f"needs {error.name}: pip install 'tokenmix_ops[video,triton]'")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
