"""The tolerance rule: it lets right computations pass, on any processor, and no wrong one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from agreement import (
    assert_within,
    compute,
    expected,
    oracle,
    plain_pytorch,
    random_cases,
    some_output_grad,
)
from fused_emulation import FAULTS, emulated
from hypothesis import given, settings

import tokenmix_ops as tm
from tokenmix_ops.testing import CASES, Case, output_and_gradients
from tokenmix_ops.tolerance import (
    FUSED,
    MEAN_SQUARE,
    Arithmetic,
    error_budget,
    growth,
    rms_error,
    rms_limit,
)

HALF = (torch.bfloat16, torch.float16)
COMPOSED = Arithmetic(composed=True)
WORK = Case(tm.Mixing.released(), batch=1, num_frames=4, num_tokens=50, num_heads=2, head_dim=32)
"""Large enough that one key of 53 is a small part of the output."""
MANY_FRAMES = Case(tm.Mixing.joint(), batch=1, num_frames=24, num_tokens=6, num_heads=2)
BY_FRAME = [c for c in CASES if c.mixing.kind != "temporal" and c.layout != "selected"]


def inputs_of(case, dtype, size=1.0):
    query, key, value = (t.detach() for t in case.inputs(dtype))
    return size * query, size * key, value


def check(attention, case, inputs, arithmetic=FUSED):
    output_grad = some_output_grad(inputs[0])
    wanted = expected(case, inputs, output_grad, arithmetic)
    assert_within(wanted, output_and_gradients(attention, inputs, output_grad), inputs[0].dtype)


def exact_is_the_oracles(case):
    inputs = inputs_of(case, torch.float64)
    output_grad = some_output_grad(inputs[0])
    by_definition = output_and_gradients(oracle(case), inputs, output_grad)
    for name, budget in error_budget(*inputs, output_grad, case.plan).items():
        error = (budget.exact - by_definition[name]).abs()
        assert error.amax() <= 1e-14 * (1 + by_definition[name].abs().amax()), name


# The definition takes a query at a time.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=pytest.mark.slow if c.num_frames * c.num_tokens > 200 else ())
        for c in CASES
    ],
    ids=str,
)
def test_exact_values_are_those_of_the_definition(case):
    exact_is_the_oracles(case)


@settings(max_examples=25)
@given(random_cases())
def test_exact_values_of_any_case_are_those_of_the_definition(case):
    exact_is_the_oracles(case)


@pytest.mark.parametrize("size", [1.0, 4.0], ids=["", "large logits"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", [WORK, MANY_FRAMES, *BY_FRAME[:-1:3]], ids=str)
def test_a_right_kernel_passes_with_an_exponential_off_by_2_ulp(case, dtype, size):
    check(emulated(case), case, inputs_of(case, dtype, size))


@pytest.mark.parametrize(
    ("fault", "dtype"), [(fault, getattr(torch, d)) for fault, ds in FAULTS.items() for d in ds]
)
def test_a_planted_fault_fails(fault, dtype):
    case = MANY_FRAMES if "of frames" in fault else WORK

    def passes(size):
        try:
            check(emulated(case, fault), case, inputs_of(case, dtype, size))
        except AssertionError:
            return False
        return True

    assert not (passes(1.0) and passes(4.0))


def offset(case, dtype, by):
    query, key, value = inputs_of(case, dtype)
    return query, key, value + by


EXTREMES = {
    "weights below the smallest normal number": lambda dtype: inputs_of(WORK, dtype, 16.0),
    "weights of 0 and 1 alone": lambda dtype: inputs_of(WORK, dtype, 100.0),
    "equal logits": lambda dtype: inputs_of(WORK, dtype, 0.0),
    "values far from zero": lambda dtype: offset(WORK, dtype, 100.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_right_computations_of_extreme_inputs_pass(extreme, dtype):
    inputs = EXTREMES[extreme](dtype)
    check(emulated(WORK), WORK, inputs)
    check(compute(WORK, "eager"), WORK, inputs, COMPOSED)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_gradients_that_underflow_float16_pass(size):
    inputs = inputs_of(WORK, torch.float16)
    output_grad = size * some_output_grad(inputs[0])
    found = output_and_gradients(emulated(WORK), inputs, output_grad)
    assert_within(expected(WORK, inputs, output_grad), found, torch.float16)


def test_a_token_in_many_slots_passes():
    case = Case(tm.Mixing.from_index([5] * 60 + [7]), batch=1, num_heads=1)
    check(compute(case, "eager"), case, inputs_of(case, torch.float32), COMPOSED)


@pytest.mark.parametrize("way", [plain_pytorch, oracle])
def test_plain_pytorch_passes(way):
    case = Case(tm.Mixing.released(), num_frames=3)
    check(way(case), case, inputs_of(case, torch.float32), COMPOSED)


def test_an_exact_zero_allows_nothing():
    case = Case(tm.Mixing.paper())
    inputs = inputs_of(case, torch.float32)
    budget = error_budget(*inputs, some_output_grad(inputs[0]), case.plan)["key gradient"]
    unused = torch.ones(case.num_frames * case.num_tokens, dtype=torch.bool)
    unused[case.plan.key_index.flatten().long()] = False
    limits = budget.limit.flatten(1, 2)
    assert limits[:, unused].eq(0).all()
    assert limits[:, ~unused].gt(0).all()


def test_luck_of_plain_pytorch_does_not_tighten_the_limit():
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    lucky, usual = exact.float(), (exact * (1 + 1e-3)).float()
    one_rounding = 2**-24 * float(exact.square().mean().sqrt()) * MEAN_SQUARE**0.5
    assert rms_limit(exact, lucky) == pytest.approx(2 * one_rounding)
    assert rms_limit(exact, lucky, mean_square=1e-6) == pytest.approx(2e-3)
    assert rms_limit(exact, usual, mean_square=1e-12) == 2 * rms_error(usual, exact)


def test_nan_is_infinitely_wrong():
    exact = torch.ones(3, dtype=torch.float64)
    assert rms_error(torch.tensor([1.0, torch.nan, 1.0]), exact) == torch.inf
    case = Case(tm.Mixing.released())
    inputs = inputs_of(case, torch.float32)
    found = output_and_gradients(compute(case), inputs, some_output_grad(inputs[0]))
    found["output"][0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(AssertionError, match="output: 1 of"):
        assert_within(expected(case, inputs, some_output_grad(inputs[0])), found, torch.float32)


@pytest.mark.parametrize(("terms", "roundings"), [(1, 1), (36, 36), (144, 72), (10_000, 600)])
def test_growth_is_the_square_root_of_long_sums(terms, roundings):
    assert growth(terms) == roundings


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_the_rule_holds_with_any_kernels_of_pytorch(capability, threads):
    """All cases of the eager backend and of plain PyTorch, as another processor computes them."""
    here = Path(__file__).parent
    program = f"""
import torch
torch.set_num_threads({threads})
import pytest
raise SystemExit(pytest.main([
    "-q", "-p", "no:cacheprovider", "-p", "no:xdist", {str(here / "test_functional.py")!r},
    {str(here / "test_tolerance.py")!r}, "-m", "not slow",
    "-k", "agree_with_float64 and eager or right_kernel or planted or plain_pytorch",
]))
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    if capability != "avx512":
        environment |= {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-5000:]
