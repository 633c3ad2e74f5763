"""What is typed is a number that can be used, or is refused in a sentence."""

from argparse import ArgumentTypeError

import pytest

from bench import arguments


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (arguments.positive_int, "7", 7),
        (arguments.positive, "0.5", 0.5),
        (arguments.head_dim, "256", 256),
        (arguments.setting, "num_stages=1,2", ("num_stages", [1, 2])),
        (arguments.setting, "maxnreg=168,none", ("maxnreg", [168, None])),
        (arguments.setting, "gain_by_frame=0", ("gain_by_frame", [0])),
    ],
)
def test_what_is_meant_is_read(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        *((arguments.positive_int, text, "a whole number of at least 1") for text in ("0", "-1")),
        *((arguments.positive_int, text, "a whole number of at least 1") for text in ("2.5", "")),
        *((arguments.positive, text, "a number above 0") for text in ("0", "-3", "nan", "inf")),
        (arguments.positive, "long", "a number above 0"),
        *((arguments.head_dim, text, "a number from 1 to 256") for text in ("0", "257", "x")),
        *(
            (arguments.setting, text, r"NAME=NUMBER\[,NUMBER...\] with a name of BLOCK_M, .*")
            for text in (
                *("stages=2", "num_stages", "num_stages=two", "maxnreg=", "num_stages=0"),
                *("num_warps=none", "gain_by_frame=-1"),
            )
        ),
    ],
)
def test_what_cannot_be_used_is_refused(kind, text, expected):
    with pytest.raises(ArgumentTypeError, match=f"expected {expected}, got '{text}'"):
        kind(text)
