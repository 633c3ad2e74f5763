"""The smoke test passes right kernels and names each that is wrong."""

import pytest
import torch

pytest.importorskip("triton")

import tokenmix_ops as tm
from bench import smoke
from tokenmix_ops.backends.triton import configs, interpreted, launch
from tokenmix_ops.testing import Case

pytestmark = pytest.mark.skipif(not interpreted(), reason="plants faults in the interpreter's way")

TINY = Case(tm.Mixing.released(), batch=2, num_frames=2, num_tokens=5, num_heads=1, head_dim=16)


def outcomes(algorithm, dtype=torch.float32):
    rows = smoke.smoke_rows("released", TINY, dtype, algorithm, "cpu")
    return {row["kernel"]: row.get("why", row["outcome"]) for row in rows}


@pytest.mark.parametrize("algorithm", smoke.ALGORITHMS)
def test_right_kernels_are_right(algorithm, monkeypatch):
    ran, names = [], {id(kernel): name for name, kernel in launch.KERNELS.items()}
    real = launch.Launch.__call__

    def noting(self, *arguments):
        ran.append(names[id(self.kernel)])
        real(self, *arguments)

    monkeypatch.setattr(launch.Launch, "__call__", noting)
    kernels = smoke.ALGORITHMS[algorithm]
    assert outcomes(algorithm) == dict.fromkeys(kernels, "right")
    assert ran == [*kernels, *kernels]


def test_a_wrong_kernel_is_named_alone(monkeypatch):
    real = launch.backward

    def wrong(*arguments):
        query_grad, *others = real(*arguments)
        return query_grad * 1.1, *others

    monkeypatch.setattr(launch, "backward", wrong)
    found = outcomes("streamed")
    assert "query gradient: " in found.pop("bwd_query")
    assert found == {"fwd_streamed": "right", "bwd_key": "right"}


def test_other_bits_the_second_time_are_noticed(monkeypatch):
    real, calls = launch.forward, []

    def moody(*arguments):
        output, lse = real(*arguments)
        calls.append(0)
        return output * (1 + len(calls) * 2**-23), lse

    monkeypatch.setattr(launch, "forward", moody)
    assert outcomes("resident")["fwd_resident"] == "output: other bits the second time"


def test_a_kernel_that_fails_and_one_that_is_not_shipped(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(launch, "forward", fails)
    found = outcomes("streamed")
    assert set(found.values()) == {"RuntimeError: out of resource: shared memory"}
    own = configs.load("interpreter")
    without = smoke.only(own, "streamed")
    assert len(without.configs) < len(own.configs)
    with configs.replaced(without):
        assert set(outcomes("resident").values()) == {"not shipped"}
