"""What subcommands of ``python -m bench`` share: devices, files of rows, and how they end."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bench.rows import Keeper, Row

RESULTS, PAGES = Path("results"), (Path("README.md"), Path("results/README.md"))


def stop(given: Namespace, sentence: str) -> NoReturn:
    """Ends the process with exit status 1 and a sentence on standard error."""
    sys.exit(f"bench {given.name}: {sentence}")


def can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def spare(given: Namespace, file: Path, others: str) -> NoReturn:
    """Refuses to replace a file of more than what is measured."""
    stop(given, f"{file} would lose what this run leaves out ({others}); give another --results")


def prepare_processor(given: Namespace) -> bool:
    """Limits a CPU to the instruction set that is given, if any, before anything imports PyTorch;
    returns whether it is a CPU that is measured."""
    if given.isa:
        if given.device != "cpu":
            stop(given, "--isa is for --device cpu")
        from bench.isa import force

        try:
            force(given.isa)
        except RuntimeError as error:
            stop(given, str(error))
    return bool(given.device == "cpu")


def need_device(given: Namespace) -> None:
    from bench.no_gpu import why_no_gpu

    if given.device == "cuda" and (why := why_no_gpu()):
        stop(given, why)


def keeper(given: Namespace, suite: str, **facts: object) -> Keeper:
    """Keeps a suite's rows with the facts of this run in a file named after the device."""
    from tokenmix_ops.timing import device_name, environment

    need_device(given)
    device = device_name(given.device)
    about = {"device": device, **environment(given.device, given.commit), **facts}
    name = f"{suite}-{device}"
    if device == "cpu" and "isa" in given:
        from bench.isa import used

        about["isa"] = used()
        if given.isa:
            about["forced_isa"] = given.isa
            name += f"-{given.isa}"
    return keep_in(given, name, {"suite": suite, **about})


def keep_in(given: Namespace, name: str, facts: Row) -> Keeper:
    if not can_write(given.results):
        stop(given, f"cannot write to the folder {given.results}")
    return Keeper(given.results / f"{name}.jsonl", facts)


def finish(given: Namespace, keep: Keeper, left_out: Sequence[str]) -> None:
    """Prints the table of what was kept; exit status 1 if something could not be measured."""
    from bench.render import is_shown
    from bench.tables import TABLES

    if keep.rows:
        print(TABLES[given.name](keep.rows))
        into = is_shown(keep.path, PAGES, RESULTS)
        hint = "; python -m bench render puts them into the pages" if into else ""
        print(f"\nrows: {keep.path}{hint}")
    if left_out:
        stop(given, f"not measured: {'; '.join(left_out)}")
