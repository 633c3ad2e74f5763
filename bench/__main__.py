"""The command ``python -m bench NAME``: its subcommands and their arguments."""

from __future__ import annotations

import argparse
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.arguments import (
    ARCHITECTURES,
    KERNELS,
    KEYS,
    METHODS,
    commit,
    device,
    head_dim,
    isa,
    number,
    positive,
    positive_int,
    setting,
)
from bench.commands import (
    ARCHIVE,
    run_aot,
    run_cache,
    run_compare,
    run_host,
    run_layer,
    run_lease,
    run_loading,
    run_memory,
    run_operator,
    run_render,
    run_report,
    run_rerank,
    run_search,
    run_tower,
    run_training,
    run_tune,
    run_world,
)
from bench.keeping import PAGES, stop


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

    found = add("operator", run_operator, "Times the operator against its peers.", "--shapes main")
    device(found, "cuda")
    found.add_argument("--shapes", nargs="+", metavar="NAME", help="only these (all)")
    number(found, "--seconds", 1.2, "seconds for which each pass is timed, about")
    number(found, "--rounds", None, "how often each contender runs (for so many seconds)")
    isa(found)
    commit(found)
    found = add(
        "layer",
        run_layer,
        "Times a whole attention layer against the one it replaces.",
        "--device cpu --rounds 61",
    )
    device(found, "cuda")
    number(found, "--batch", None, "videos (64 on a GPU, 2 on a CPU)")
    number(found, "--rounds", None, "how often each layer runs (for about 1.2 s)")
    isa(found)
    commit(found)
    found = add(
        "tower",
        run_tower,
        "Times BLIP's whole vision tower, inference over videos of eight frames, before and after "
        "its conversion.",
        "--device cpu --rounds 21",
    )
    device(found, "cpu")
    found.add_argument(
        "--batches",
        nargs="+",
        type=positive_int,
        default=(1, 2),
        metavar="N",
        help="videos at once (1 2)",
    )
    number(found, "--rounds", 15, "how often each tower runs")
    isa(found)
    commit(found)
    found = add("host", run_host, "Times what the host spends on one call.", "--device cpu")
    device(found, "cuda")
    isa(found)
    commit(found)
    found = add(
        "lease",
        run_lease,
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
        run_training,
        "Times fine-tuning by every method against the authors' way of computing.",
        "--device cpu",
    )
    device(found, "cuda")
    number(found, "--seconds", 480.0, "time limit")
    commit(found)
    add(
        "memory",
        run_memory,
        "Works out the memory of fine-tuning by every method, with no GPU. Takes minutes.",
        "--results /tmp/results",
    )
    found = add(
        "rerank",
        run_rerank,
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
        run_loading,
        "Measures how fast videos are read for training, and in how much memory.",
        "--clips 1000",
    )
    number(found, "--clips", 10_000, "clips to read for memory")
    number(found, "--names", 48, "clips to time in a round")
    number(found, "--rounds", 3, "how often each way of reading runs")
    found = add(
        "world",
        run_world,
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
        run_search,
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
        run_aot,
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
        run_cache,
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
        run_tune,
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
        "render", run_render, "Fills the rendered blocks of pages without measuring.", "--check"
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
        run_report,
        "Prints the tables of a folder's result files, and draws what a lease measured. Writes no "
        "page.",
        "--results out",
    )
    found = add(
        "compare",
        run_compare,
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
        stop(given, f"needs {error.name}: pip install 'tokenmix_ops[video,triton]'")
    except BrokenPipeError:
        # The reader has seen enough, as `head` has; what is left must go somewhere at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
