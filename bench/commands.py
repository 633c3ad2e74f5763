"""What the subcommands of ``python -m bench`` do with their arguments.

What a benchmark needs is imported when it runs, so that the others work where that is missing.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

from bench.keeping import (
    can_write,
    finish,
    keep_in,
    keeper,
    need_device,
    prepare_processor,
    spare,
    stop,
)
from bench.rows import Row, compare, read_rows, update_rows

ARCHIVE = Path("gpu-cache.tar.xz")


def run_operator(given: Namespace) -> None:
    on_cpu = prepare_processor(given)
    from bench.floor import measured_ceilings
    from bench.operators import CPU_SHAPES, SHAPES, Shape, flex_fault, operator_rows
    from bench.passes import run_parts
    from tokenmix_ops.peers import KERNELS
    from tokenmix_ops.timing import clock_of

    need_device(given)
    clock = clock_of(given.device)
    shapes = CPU_SHAPES if on_cpu else SHAPES
    chosen = [shape for shape in shapes if given.shapes is None or shape.name in given.shapes]
    if not chosen:
        stop(given, f"expected shapes among {', '.join(repr(s.name) for s in shapes)}")
    dtypes = tuple(dict.fromkeys(shape.dtype for shape in chosen))
    keep = keeper(given, "operator")
    before = read_rows(keep.path) if keep.path.exists() else []
    if dropped := {row["shape"] for row in before} - {shape.name for shape in chosen}:
        spare(given, keep.path, f"shapes: {len(dropped)}")
    ceilings = {} if on_cpu else measured_ceilings(dtypes, clock, given.device)

    def part(shape: Shape) -> list[Row]:
        rates, kernel = ceilings.get(shape.dtype), KERNELS[given.device]
        refused = {}
        if on_cpu and (why := in_its_own_process(flex_fault, shape)):
            refused["flex"] = ("forward", why)
        return operator_rows(
            shape, rates, clock, given.device, given.seconds, given.rounds, kernel, refused
        )

    parts = [(shape.name, partial(part, shape)) for shape in chosen]
    finish(given, keep, run_parts(parts, float("inf"), keep))


def in_its_own_process(function: Callable[..., str | None], argument: object) -> str | None:
    """What a function of an argument and the number of threads answers, or that its process died of
    it, or took two minutes."""
    import torch

    from bench.pool import Pool

    with Pool(1) as pool:
        return pool.submit(function, argument, torch.get_num_threads(), seconds=120.0).result()


def run_layer(given: Namespace) -> None:
    on_cpu = prepare_processor(given)
    import torch

    from bench.layers import layer_rows
    from bench.passes import run_parts
    from tokenmix_ops.peers import KERNELS
    from tokenmix_ops.timing import clock_of

    batch = given.batch or (2 if on_cpu else 64)
    keep = keeper(given, "layer")

    def part() -> list[Row]:
        return layer_rows(
            clock_of(given.device),
            given.device,
            1.2,
            batch=batch,
            dtype=torch.float32 if on_cpu else torch.bfloat16,
            backend=KERNELS[given.device],
            with_eager=on_cpu,
            rounds=given.rounds,
        )

    finish(given, keep, run_parts([(f"layer, B = {batch}", part)], float("inf"), keep))


def run_tower(given: Namespace) -> None:
    prepare_processor(given)
    from bench.passes import run_parts
    from bench.tower import parts
    from tokenmix_ops.timing import clock_of

    keep = keeper(given, "tower")
    named = parts(clock_of(given.device), given.device, given.batches, given.rounds)
    finish(given, keep, run_parts(named, float("inf"), keep))


def run_host(given: Namespace) -> None:
    prepare_processor(given)
    from bench.operators import host_rows
    from tokenmix_ops.peers import KERNELS
    from tokenmix_ops.timing import clock_of

    keep = keeper(given, "host")
    keep(host_rows(clock_of(given.device), given.device, KERNELS[given.device]))
    finish(given, keep, [])


def run_lease(given: Namespace) -> None:
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
        stop(given, str(error))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if lease.left_out:
        stop(given, f"not as planned: {'; '.join(lease.left_out)}")


def run_training(given: Namespace) -> None:
    import torch

    from bench.passes import run_parts
    from bench.training import SIZES, parts
    from tokenmix_ops.timing import clock_of

    precision = torch.get_float32_matmul_precision()
    keep = keeper(given, "training", float32_matmul_precision=precision)
    named = parts(given.device, SIZES[given.device], clock_of(given.device))
    finish(given, keep, run_parts(named, given.seconds, keep))


def run_memory(given: Namespace) -> None:
    from bench.memory import memory_row
    from bench.training import Size, all_runs
    from tokenmix_ops.timing import environment

    machine = {k: v for k, v in environment().items() if k not in ("hardware", "threads")}
    facts = {"hardware": "none: fake tensors", **machine}
    keep = keep_in(given, "memory-fake", facts)
    for run in all_runs():
        keep([memory_row(run, Size())])
        print(f"{run}: {keep.rows[-1]['peak_gib']} GiB", flush=True)
    finish(given, keep, [])


def run_rerank(given: Namespace) -> None:
    import torch

    from bench.rerank import rerank_rows
    from tokenmix_ops.timing import device_name

    need_device(given)
    keep = keep_in(given, f"rerank-{device_name(given.device)}", {})
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
    finish(given, keep, [])


def run_loading(given: Namespace) -> None:
    from tempfile import TemporaryDirectory

    from bench.loading import loading_rows

    keep = keep_in(given, "loading-cpu", {})
    if given.names < 12:
        stop(given, f"expected at least 12 for --names, got {given.names}")
    with TemporaryDirectory() as folder:
        for row in loading_rows(
            Path(folder),
            clips=given.clips,
            names=given.names,
            rounds=given.rounds,
            progress=partial(print, flush=True),
        ):
            keep([row])
    finish(given, keep, [])


def run_world(given: Namespace) -> None:
    from rich.console import Console

    from bench.tables.video import world_table
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


def run_search(given: Namespace) -> None:
    from bench.search_world import measure
    from bench.tables.video import search_table

    path = given.results / "search-cpu.jsonl"
    found = measure(given.checkpoint, given.work, given.clips, given.rerank, given.seed)
    # Rows of other retrievers stay.
    rows = update_rows(path, found, ("checkpoint", "rerank"))
    print(f"{search_table(rows)}\n\nrows: {path}")


def run_aot(given: Namespace) -> None:
    from bench.aot import SHIPPED, all_cases, compile_all, fastest_first, left_out, problems
    from bench.side_by_side import counter
    from bench.tables.compiler import loops_table

    progress = counter("compiled {} kernels")
    targets = given.architectures or SHIPPED
    cases = all_cases(targets, given.head_dims, given.dtypes, given.kernels, given.keys)
    if not cases:
        which = (
            f"{', '.join(given.kernels)} on {', '.join(targets)} with {', '.join(given.keys)} keys"
        )
        stop(given, f"no kernel to compile: {which} is never launched")
    if given.set:
        values = dict(given.set)
        changes = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
        rows = compile_all(cases, progress, changes)
        print(loops_table(sorted(rows, key=fastest_first)))
        if failed := sum("error" in row for row in rows):
            stop(given, f"{failed} of {len(rows)} variants do not compile")
        return
    keep = keep_in(given, "aot", {})
    if lost := left_out(keep.path, cases):
        spare(given, keep.path, f"kernels: {lost}")
    keep(compile_all(cases, progress))
    finish(given, keep, [])
    if found := problems(keep.rows):
        stop(given, "\n".join(["problems:", *found]))


def run_cache(given: Namespace) -> None:
    from importlib.util import find_spec

    if find_spec("triton") is None:
        stop(given, "needs Triton: pip install 'tokenmix_ops[triton]'")
    from bench.kernel_archive import pack
    from bench.kernel_calls import ARCHITECTURE, all_calls, compile_all, refusal
    from bench.side_by_side import counter
    from tokenmix_ops.timing import environment

    if why := refusal():
        stop(given, why)
    if given.calls and given.archive is None:
        stop(given, f"expected --archive with --calls, or {ARCHIVE} would lose all other kernels")
    archive = given.archive or ARCHIVE
    calls = {n: c for n, c in all_calls().items() if n.startswith(tuple(given.calls or ("",)))}
    if not calls:
        given_names = " or ".join(given.calls)
        stop(given, f"no call begins with {given_names}; main, layer, host and smoke are some")
    for folder in (given.folder, archive.parent):
        if not can_write(folder):
            stop(given, f"cannot write to the folder {folder}")
    progress = counter("compiled the kernels of {} calls")
    kernels, failed = compile_all(calls, given.folder, progress)
    known = environment()
    facts = {name: known[name] for name in ("torch", "tokenmix_ops", "commit", "date")}
    if kernels:
        pack(given.folder, kernels, archive, {"architecture": ARCHITECTURE, **facts})
        megabytes = archive.stat().st_size / 1e6
        print(f"{len(kernels)} kernels, {megabytes:.1f} MB: {archive}")
    if failed:
        stop(given, "\n".join(["not compiled:", *(f"{n}: {why}" for n, why in failed.items())]))


def run_tune(given: Namespace) -> None:
    from importlib.util import find_spec

    given.device = "cuda"
    need_device(given)
    if find_spec("triton") is None:
        stop(given, "needs Triton: pip install 'tokenmix_ops[triton]'")
    from bench.tune import tune_this_gpu

    try:
        path = tune_this_gpu(given.kernels, given.minutes, given.results, given.commit)
    except (OSError, RuntimeError) as error:
        stop(given, str(error))
    print(f"written: {path}")


def run_render(given: Namespace) -> None:
    from bench.render import update

    try:
        update(given.pages, given.results, given.check)
    except (ValueError, OSError) as error:
        stop(given, str(error))


def run_report(given: Namespace) -> None:
    from bench.report import reports

    try:
        texts = [*reports(given.results)]
    except (ValueError, OSError) as error:
        stop(given, str(error))
    print("\n".join(texts))


def run_compare(given: Namespace) -> None:
    try:
        table = compare(read_rows(given.old), read_rows(given.new))
    except (ValueError, OSError) as error:
        stop(given, str(error))
    print(table)
