"""Products that take turns with the operator have as many operations."""

from dataclasses import replace

import pytest
import torch

import tokenmix_ops as tm
from bench.floor import works
from bench.operators import CPU_MAIN
from bench.products import WIDTH, own_products, sizes, yardsticks
from bench.titles import PRODUCTS
from tokenmix_ops.testing import Case

TINY = Case(tm.Mixing.released(), batch=2, num_frames=4, num_tokens=18, num_heads=2, head_dim=16)


@pytest.mark.parametrize("flops", [1.0, 5e6, 2e9, 1.7e10])
def test_a_product_has_as_many_operations(flops):
    rows, width = sizes(flops)
    assert width <= WIDTH
    assert 2 * rows * width**2 == pytest.approx(flops, rel=0.05 if flops > 1 else 1)


def test_a_small_product_is_a_cube_and_a_large_one_has_many_rows():
    assert sizes(2 * 200**3) == (200, 200)
    assert sizes(2 * 5000 * WIDTH**2) == (5000, WIDTH)


def test_its_own_products_are_those_of_the_operator(monkeypatch):
    counted = []
    real = torch.bmm

    def bmm(left, right, out):
        counted.append(2 * left.shape[0] * left.shape[1] * left.shape[2] * right.shape[2])
        return real(left, right, out=out)

    monkeypatch.setattr(torch, "bmm", bmm)
    for mixing in (tm.Mixing.released(), tm.Mixing.adjacent((-1, 0, 1)), tm.Mixing.spatial()):
        case = replace(TINY, mixing=mixing)
        counted.clear()
        own_products(case, case.plan)(0)()
        (work,) = works(case, case.plan, 4)["forward"]
        assert sum(counted) == work.flops


def test_only_the_forward_pass_has_its_own_products():
    assert yardsticks(TINY, TINY.plan, "forward", 1e6).keys() == PRODUCTS.keys()
    backward = yardsticks(TINY, TINY.plan, "backward", 1e6)
    assert backward.keys() == {"product"}
    temporal = replace(CPU_MAIN, mixing=tm.Mixing.temporal(), num_tokens=5)
    found = yardsticks(temporal, temporal.plan, "forward", 1e6)
    assert found.keys() == {"product"}
