"""The command ``python -m bench NAME``: each subcommand parses its arguments and runs a benchmark.

What a benchmark needs is imported when it runs, so that the others work where that is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NoReturn

from bench.arguments import (
    ARCHITECTURES,
    KERNELS,
    KEYS,
    METHODS,
    commit,
    device,
    head_dim,
    number,
    positive,
    positive_int,
    setting,
)
from bench.rows import Keeper, Row, compare, read_rows, update_rows

ARCHIVE = Path("gpu-cache.tar.xz")
RESULTS, PAGES = Path("results"), (Path("README.md"), Path("results/README.md"))


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
    keep = _keeper(given, "operator")
    before = read_rows(keep.path) if keep.path.exists() else []
    if dropped := {row["shape"] for row in before} - {shape.name for shape in chosen}:
        _spare(given, keep.path, f"shapes: {len(dropped)}")
    ceilings = measured_ceilings(dtypes, clock, given.device, size)

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


def _lease(given: Namespace) -> None:
    import signal

    from bench.lease import PLAN, REHEARSAL, Lease

    # Stages are sessions of their own: they have to be killed whoever ends this process, unless it
    # was told to outlive its terminal.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {n: signal.signal(n, signal.default_int_handler) for n in numbers}
    if given.dry_run:
        # The kernels run under Triton's interpreter, which has to know before it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    plan = REHEARSAL if given.dry_run else PLAN
    lease = Lease(given.results, given.seconds, given.commit, given.dry_run, plan)
    try:
        lease.run()
    except RuntimeError as error:
        _stop(given, str(error))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if lease.left_out:
        _stop(given, f"not as planned: {'; '.join(lease.left_out)}")


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
    keep = _keep_in(given, "memory-fake", facts)
    for run in all_runs():
        keep([memory_row(run, Size())])
        print(f"{run}: {keep.rows[-1]['peak_gib']} GiB", flush=True)
    _finish(given, keep, [])


def _rerank(given: Namespace) -> None:
    import torch

    from bench.rerank import rerank_rows
    from tokenmix_ops.timing import device_name

    _need_device(given)
    keep = _keep_in(given, f"rerank-{device_name(given.device)}", {})
    rows = rerank_rows(
        videos=given.videos,
        texts=given.texts,
        texts_at_once=given.texts_at_once,
        rounds=given.rounds,
        device=given.device,
        dtype=getattr(torch, given.dtype),
        commit=given.commit,
        progress=lambda done: print(f"round {done}", flush=True),
    )
    keep(rows)
    _finish(given, keep, [])


def _loading(given: Namespace) -> None:
    from tempfile import TemporaryDirectory

    from bench.loading import loading_rows

    keep = _keep_in(given, "loading-cpu", {})
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
    from bench.aot import SHIPPED, all_cases, compile_all, fastest_first, left_out, problems
    from bench.side_by_side import counter
    from bench.tables import loops_table

    progress = counter("compiled {} kernels")
    targets = given.architectures or SHIPPED
    cases = all_cases(targets, given.head_dims, given.dtypes, given.kernels, given.keys)
    if not cases:
        which = (
            f"{', '.join(given.kernels)} on {', '.join(targets)} with {', '.join(given.keys)} keys"
        )
        _stop(given, f"no kernel to compile: {which} is never launched")
    if given.set:
        values = dict(given.set)
        changes = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
        rows = compile_all(cases, progress, changes)
        print(loops_table(sorted(rows, key=fastest_first)))
        if failed := sum("error" in row for row in rows):
            _stop(given, f"{failed} of {len(rows)} variants do not compile")
        return
    keep = _keep_in(given, "aot", {})
    if lost := left_out(keep.path, cases):
        _spare(given, keep.path, f"kernels: {lost}")
    keep(compile_all(cases, progress))
    _finish(given, keep, [])
    if found := problems(keep.rows):
        _stop(given, "\n".join(["problems:", *found]))


def _cache(given: Namespace) -> None:
    from importlib.util import find_spec

    if find_spec("triton") is None:
        _stop(given, "needs Triton: pip install 'tokenmix_ops[triton]'")
    from bench.kernel_archive import pack
    from bench.kernel_calls import ARCHITECTURE, all_calls, compile_all, refusal
    from bench.side_by_side import counter
    from tokenmix_ops.timing import environment

    if why := refusal():
        _stop(given, why)
    if given.calls and given.archive is None:
        _stop(given, f"expected --archive with --calls, or {ARCHIVE} would lose all other kernels")
    archive = given.archive or ARCHIVE
    calls = {n: c for n, c in all_calls().items() if n.startswith(tuple(given.calls or ("",)))}
    if not calls:
        given_names = " or ".join(given.calls)
        _stop(given, f"no call begins with {given_names}; main, layer, host and smoke are some")
    for folder in (given.folder, archive.parent):
        if not _can_write(folder):
            _stop(given, f"cannot write to the folder {folder}")
    progress = counter("compiled the kernels of {} calls")
    kernels, failed = compile_all(calls, given.folder, progress)
    known = environment()
    facts = {name: known[name] for name in ("torch", "tokenmix_ops", "commit", "date")}
    if kernels:
        pack(given.folder, kernels, archive, {"architecture": ARCHITECTURE, **facts})
        megabytes = archive.stat().st_size / 1e6
        print(f"{len(kernels)} kernels, {megabytes:.1f} MB: {archive}")
    if failed:
        _stop(given, "\n".join(["not compiled:", *(f"{n}: {why}" for n, why in failed.items())]))


def _tune(given: Namespace) -> None:
    from importlib.util import find_spec

    given.device = "cuda"
    _need_device(given)
    if find_spec("triton") is None:
        _stop(given, "needs Triton: pip install 'tokenmix_ops[triton]'")
    from bench.tune import tune_this_gpu

    try:
        path = tune_this_gpu(given.kernels, given.minutes, given.results, given.commit)
    except (OSError, RuntimeError) as error:
        _stop(given, str(error))
    print(f"written: {path}")


def _render(given: Namespace) -> None:
    from bench.render import update

    try:
        update(given.pages, given.results, given.check)
    except (ValueError, OSError) as error:
        _stop(given, str(error))


def _report(given: Namespace) -> None:
    from bench.report import reports

    try:
        texts = [*reports(given.results)]
    except (ValueError, OSError) as error:
        _stop(given, str(error))
    print("\n".join(texts))


def _compare(given: Namespace) -> None:
    try:
        table = compare(read_rows(given.old), read_rows(given.new))
    except (ValueError, OSError) as error:
        _stop(given, str(error))
    print(table)


def _stop(given: Namespace, sentence: str) -> NoReturn:
    sys.exit(f"bench {given.name}: {sentence}")


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _spare(given: Namespace, file: Path, others: str) -> NoReturn:
    """Refuses to replace a file of more than what is measured."""
    _stop(given, f"{file} would lose what this run leaves out ({others}); give another --results")


def _need_device(given: Namespace) -> None:
    from bench.no_gpu import why_no_gpu

    if given.device == "cuda" and (why := why_no_gpu()):
        _stop(given, why)


def _keeper(given: Namespace, suite: str, **facts: object) -> Keeper:
    """Keeps a suite's rows with the facts of this run in a file named after the device."""
    from tokenmix_ops.timing import device_name, environment

    _need_device(given)
    device = device_name(given.device)
    about = {"device": device, **environment(given.device, given.commit), **facts}
    return _keep_in(given, f"{suite}-{device}", {"suite": suite, **about})


def _keep_in(given: Namespace, name: str, facts: Row) -> Keeper:
    if not _can_write(given.results):
        _stop(given, f"cannot write to the folder {given.results}")
    return Keeper(given.results / f"{name}.jsonl", facts)


def _finish(given: Namespace, keep: Keeper, left_out: Sequence[str]) -> None:
    """Prints the table of what was kept; exit status 1 if something could not be measured."""
    from bench.render import is_shown
    from bench.tables import TABLES

    if keep.rows:
        print(TABLES[given.name](keep.rows))
        into = is_shown(keep.path, PAGES, RESULTS)
        hint = "; python -m bench render puts them into the pages" if into else ""
        print(f"\nrows: {keep.path}{hint}")
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
        name: str,
        run: Callable[[Namespace], None],
        text: str,
        example: str,
        results: str = "results",
    ) -> ArgumentParser:
        found = subcommands.add_parser(
            name,
            help=text[0].lower() + text[1:].split(".")[0],
            description=text,
            epilog=f"Example: python -m bench {name} {example}".strip(),
        )
        found.set_defaults(run=run, parser=found)
        if results:
            found.add_argument(
                "--results",
                type=Path,
                default=Path(results),
                metavar="DIR",
                help="where result files are (%(default)s)",
            )
        return found

    found = add("operator", _operator, "Times the operator against its peers.", "--shapes main")
    device(found, "cuda")
    found.add_argument("--shapes", nargs="+", metavar="NAME", help="only these (all)")
    number(found, "--seconds", 1.2, "seconds for which each pass is timed, about")
    commit(found)
    found = add(
        "layer",
        _layer,
        "Times a whole attention layer against the one it replaces.",
        "--device cpu --rounds 61",
    )
    device(found, "cuda")
    number(found, "--batch", None, "videos (64 on a GPU, 2 on a CPU)")
    number(found, "--rounds", None, "how often each layer runs (for about 1.2 s)")
    commit(found)
    found = add("host", _host, "Times what the host spends on one call.", "--device cpu")
    device(found, "cuda")
    commit(found)
    found = add(
        "lease",
        _lease,
        "Measures as much as it can on a GPU that you have for a few minutes. It checks the "
        "kernels, times the main shape, runs the tests, tunes launch configurations, then times "
        "everything with them. A stage that breaks or hangs is killed, and the rest goes on. "
        "Exit status 1 if a stage did not end as planned.",
        "--results out --seconds 585",
        results="out",
    )
    number(found, "--seconds", 585.0, "time limit of the whole run, at least 60")
    found.add_argument(
        "--dry-run",
        action="store_true",
        help="rehearse the whole plan on a CPU, at tiny sizes, with planted faults",
    )
    commit(found)
    found = add(
        "training",
        _training,
        "Times fine-tuning by every method against the authors' way of computing.",
        "--device cpu",
    )
    device(found, "cuda")
    number(found, "--seconds", 480.0, "time limit")
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
    number(found, "--texts-at-once", 16, "texts in a batch, which bounds the memory")
    number(found, "--rounds", 3, "how often each way runs")
    commit(found)
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
        ("--clips", positive_int, "clips that move"),
        ("--stills", positive_int, "clips whose single frames are learnt first"),
        ("--still-epochs", positive_int, "epochs on still frames"),
        ("--still-learning-rate", positive, "highest learning rate on them"),
        ("--epochs", positive_int, "epochs of each method"),
        ("--learning-rate", positive, "highest learning rate of each method"),
        ("--seed", int, "the seed of the world and of the training"),
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
    found.add_argument(
        "--seed",
        type=int,
        default=5000,
        metavar="N",
        help="the seed of the clips; training used another one (%(default)s)",
    )
    found = add(
        "aot",
        _aot,
        "Compiles every Triton kernel with no GPU and reports what came out. Exit status 1 if a "
        "kernel does not compile, is empty, does not fit, spills much at head_dim 64 or has no "
        "matrix instructions.",
        "--architectures sm_86 sm_120 --results /tmp/results",
    )
    found.add_argument(
        "--architectures",
        nargs="+",
        choices=ARCHITECTURES,
        metavar="NAME",
        help=f"of {', '.join(ARCHITECTURES)} (those with a launch file; the others share one)",
    )
    found.add_argument(
        "--head-dims",
        nargs="+",
        type=head_dim,
        default=(64, 128),
        metavar="N",
        help="from 1 to 256 (64 128)",
    )
    all_dtypes = ("float16", "bfloat16", "float32")
    found.add_argument("--dtypes", nargs="+", choices=all_dtypes, default=all_dtypes, help="(all)")
    found.add_argument(
        "--kernels",
        nargs="+",
        choices=KERNELS,
        default=KERNELS,
        metavar="NAME",
        help=f"of {', '.join(KERNELS)} (all)",
    )
    found.add_argument("--keys", nargs="+", choices=KEYS, default=KEYS, help="(all)")
    found.add_argument(
        "--set",
        nargs="+",
        type=setting,
        metavar="NAME=N",
        help="compare launch configurations: compile the kernels with every combination of such "
        "values as num_stages=1,2 maxnreg=168,none in place of those that are shipped, print a "
        "table and write nothing",
    )
    found = add(
        "cache",
        _cache,
        "Compiles the kernels that a lease calls, without a GPU, and packs them into an archive. "
        "They are for sm_90 (H100, H200), and found there only by Python 3.12 with the Triton of "
        "tools/gpu.txt, on the sources that they were compiled from. Run it in .venv-gpu; all "
        "calls take some minutes of all cores.",
        "--calls main host --archive /tmp/some.tar.xz",
        results="",
    )
    found.add_argument(
        "--calls", nargs="+", metavar="NAME", help="only calls whose names begin with one of these"
    )
    found.add_argument(
        "--folder",
        type=Path,
        default=Path(".gpu-cache"),
        help="Triton's cache; what it has is not compiled again (%(default)s)",
    )
    found.add_argument("--archive", type=Path, help=f"({ARCHIVE}; needed with --calls)")
    found = add(
        "tune",
        _tune,
        "Measures launch configurations on this GPU and writes the best. With --results DIR, "
        "DIR/sm_90.json (or what this GPU's file is called) is replaced as a whole after every "
        "goal, the most valuable first, and DIR/tune-CARD.jsonl gets a row for each candidate and "
        "case that is timed and for each candidate that is dropped, with the reason, as it comes: "
        "the run may be killed at any moment. The package's own file is not touched; a launch file "
        "that DIR has already is continued. Without --results the package's file is rewritten and "
        "no rows are kept.",
        "--results out --minutes 2.5",
        results="",
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
    found.add_argument(
        "--results", type=Path, metavar="DIR", help="write there (into the package, without rows)"
    )
    commit(found)
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
    add(
        "report",
        _report,
        "Prints the tables of a folder's result files, and draws what a lease measured. Writes no "
        "page.",
        "--results out",
    )
    found = add(
        "compare",
        _compare,
        "Sets two result files side by side: the ratio of medians, old over new.",
        "old/gpu-h100.jsonl new/gpu-h100.jsonl",
        results="",
    )
    found.add_argument("old", type=Path, help="a result file")
    found.add_argument("new", type=Path, help="another one of the same kind")
    return whole


def main(arguments: Sequence[str] | None = None) -> None:
    # parse_args would show the usage of the whole command for what a subcommand does not know.
    given, unknown = parser().parse_known_args(arguments)
    if unknown:
        given.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        given.run(given)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        _stop(given, f"needs {error.name}: pip install 'tokenmix_ops[video,triton]'")
    except BrokenPipeError:
        # The reader has seen enough, as `head` has; what is left must go somewhere at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
