"""Wrong results are found before they are timed."""

import pytest
import torch

import tokenmix_ops as tm
from bench import checks
from bench.checks import BACKENDS, checked, fault, relative_errors
from bench.passes import Contender
from tokenmix_ops.peers import operators as ways
from tokenmix_ops.testing import Case

TINY = Case(tm.Mixing.released(), batch=2, num_frames=4, num_tokens=18, num_heads=2, head_dim=16)


def test_errors_too_large_or_nan_are_faults():
    exact = {"output": torch.ones(4, dtype=torch.float64)}
    assert relative_errors({"output": torch.full((4,), 1.5)}, exact) == {"output": 0.5}
    poisoned = relative_errors({"output": torch.tensor([1.0, float("nan"), 1, 1])}, exact)
    assert "relative error of inf" in fault(poisoned, torch.bfloat16)
    assert fault({"output": 1e-3, "key gradient": 2.9e-2}, torch.bfloat16) is None
    assert "key gradient" in fault({"output": 1e-3, "key gradient": 3.1e-2}, torch.bfloat16)


def contender(call, dtype, case=TINY):
    inputs = tuple(t.detach() for t in case.inputs(dtype))
    return Contender(call, [inputs], [torch.randn(inputs[0].shape).to(dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_results_are_held_to_the_computed_tolerance(dtype):
    plan, eager = TINY.plan, ways(TINY.plan)["eager"]

    def nearly(query, key, value):
        # An error that a peer may have.
        return eager(query, key, value) * (1 + checks.LARGEST_ERROR[dtype] / 2)

    found, forward, backward = checked(
        contender(eager, dtype), plan, dtype, True, BACKENDS["eager"]
    )
    assert (forward, backward) == (None, None)
    assert found.keys() == {"output", "query gradient", "key gradient", "value gradient"}
    assert checked(contender(nearly, dtype), plan, dtype)[1:] == (None, None)
    _, forward, _ = checked(contender(nearly, dtype), plan, dtype, True, BACKENDS["eager"])
    assert forward.startswith("wrong: output: ")


def test_a_wrong_gradient_forbids_backward_passes_alone():
    eager = ways(TINY.plan)["eager"]

    def detached(query, key, value):
        return eager(query, key.detach(), value) + 0 * key.sum()

    for arithmetic in (None, BACKENDS["eager"]):
        found = checked(
            contender(detached, torch.float32), TINY.plan, torch.float32, True, arithmetic
        )
        assert found[1] is None
        assert "key gradient" in found[2]
