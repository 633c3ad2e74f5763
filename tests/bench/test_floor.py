"""The floor of a computation, worked out by hand."""

import pytest
import torch

import tokenmix_ops as tm
from bench import operators
from bench.floor import Ceilings, backward_work, floor, forward_work, measured_ceilings, works
from tokenmix_ops.testing import Case
from tokenmix_ops.timing import HostClock

SMALL = Case(tm.Mixing.released(), batch=1, num_frames=2, num_tokens=3, num_heads=1, head_dim=4)


def test_work_by_hand():
    # Six queries, four keys ([CLS] of both frames, then two patches), four numbers of two bytes.
    forward, backward = (of(SMALL, SMALL.plan, 2) for of in (forward_work, backward_work))
    assert forward.flops == 2 * (2 * 6 * 4 * 4)
    assert forward.bytes == 8 * (6 + 4 + 4 + 6)
    assert forward.exponentials == 6 * 4
    assert backward.flops == 5 * (2 * 6 * 4 * 4)
    assert backward.bytes == 8 * (6 + 6 + 6 + 4 + 4) + 4 * 6 + 8 * (6 + 6 + 6)
    assert backward.exponentials == 6 * 4
    assert works(SMALL, SMALL.plan, 2)["forward + backward"] == (forward, backward)


def test_the_floor_is_the_largest_of_three_times():
    work = forward_work(SMALL, SMALL.plan, 2)
    assert floor(work, Ceilings(flops=384, bytes=1000, exponentials=1000)) == 1.0
    assert floor(work, Ceilings(flops=1000, bytes=80, exponentials=1000)) == 2.0
    assert floor(work, Ceilings(flops=1000, bytes=1000, exponentials=6)) == 4.0


def test_the_main_shape_has_the_work_that_the_targets_assume():
    main = operators.MAIN
    work = forward_work(main, main.plan, 2)
    assert work.flops == pytest.approx(63e9, rel=0.01)
    assert work.exponentials == pytest.approx(247e6, rel=0.01)
    rates = Ceilings(790e12, 4.3e12, 3.9e12)
    assert floor(work, rates) == pytest.approx(0.08e-3, rel=0.05)


def test_ceilings_are_measured():
    rates = measured_ceilings((torch.float32,), HostClock(), "cpu", size=64)[torch.float32]
    assert min(rates.flops, rates.bytes, rates.exponentials) > 0
