"""What a rehearsal makes up."""

from bench.operators import MAIN
from bench.rehearsal import Steps, tiny
from tokenmix_ops.timing import time_in_turn


def test_every_call_takes_a_second():
    calls = []
    contenders = {name: lambda number: lambda: calls.append(number) for name in "ab"}
    assert time_in_turn(contenders, 3, Steps()) == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert len(calls) == 6


def test_a_tiny_case_mixes_as_the_large_one():
    small = tiny(MAIN)
    assert small.mixing == MAIN.mixing
    assert small.batch * small.num_frames * small.num_tokens * small.num_heads <= 8
