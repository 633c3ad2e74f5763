"""Types, choices and options that the subcommands of ``python -m bench`` share."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from math import inf

METHODS = (
    *("token_mixing (P)", "spatial (P)", "st_adapter", "temporal"),
    *("token_mixing (F)", "spatial (F)"),
)
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
KERNELS = ("fwd_resident", "fwd_streamed", "bwd_resident", "bwd_query", "bwd_key")
KEYS = ("strided", "selected", "table", "long")
ISAS = ("avx2", "avx512")
SETTINGS = (
    *("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "maxnreg"),
    *("gain_by_frame", "programs_per_sm"),
)
"""Known here too, because --help must not import what they are from."""
LARGEST_HEAD_DIM = 256


def positive_int(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < inf:
        raise ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def head_dim(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST_HEAD_DIM:
        raise ArgumentTypeError(f"expected a number from 1 to {LARGEST_HEAD_DIM}, got {text!r}")
    return int(text)


def setting(text: str) -> tuple[str, list[int | None]]:
    """A field of launch configurations and the values to try: ``"num_stages=1,2"``."""
    name, _, numbers = text.partition("=")
    least, none = int(name != "gain_by_frame"), name == "maxnreg"
    try:
        values = [None if none and n == "none" else int(n) for n in numbers.split(",")]
    except ValueError:
        values = []
    if name not in SETTINGS or not values or any(v is not None and v < least for v in values):
        raise ArgumentTypeError(
            f"expected NAME=NUMBER[,NUMBER...] with a name of {', '.join(SETTINGS)} and numbers of "
            f"at least 1 (0 or 1 for gain_by_frame; maxnreg may be none), got {text!r}"
        )
    return name, values


def device(parser: ArgumentParser, default: str) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="(%(default)s)")


def isa(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--isa",
        choices=ISAS,
        help="on a CPU: measure as if it had no wider instructions, PyTorch's own too, into a file "
        "of that name (all that it has)",
    )


def commit(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--commit", help="name of the code that is measured, for a copy without .git"
    )


def number(parser: ArgumentParser, flag: str, default: float | None, text: str) -> None:
    """A number above 0, whole if its default is, or if it has none."""
    kind = positive if isinstance(default, float) else positive_int
    text += "" if default is None else " (%(default)s)"
    parser.add_argument(flag, type=kind, default=default, metavar="N", help=text)
