"""When the Triton backend runs, and what it says where it does not."""

import dataclasses

import pytest
import torch
from agreement import compute
from forgetting import forget
from torch._subclasses.fake_tensor import FakeTensorMode

import tokenmix_ops as tm
from tokenmix_ops import backends
from tokenmix_ops.backends import triton
from tokenmix_ops.backends.triton import configs, launch
from tokenmix_ops.testing import Case


@pytest.fixture(autouse=True)
def _beside_eager_alone(monkeypatch):
    both = {name: backends.BACKENDS[name] for name in ("triton", "eager")}
    monkeypatch.setattr(backends, "BACKENDS", both)


@pytest.fixture
def explained(monkeypatch):
    """What `explain` says of tensors on a GPU, which need not be there, with given measurements."""
    # PyTorch has to go on knowing whether one is there: fake tensors would use it.
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def explain(mixing="released", dtype=torch.float16, head_dim=64, device="cuda:0", measured=()):
        forget(triton, launch)
        measurements = dataclasses.replace(configs.load("sm_90"), fastest=measured)
        with configs.replaced(measurements), FakeTensorMode():
            inputs = (
                torch.empty(2, 4, 10, 3, head_dim, dtype=dtype, device=device) for _ in range(3)
            )
            return tm.explain(*inputs, mixing)

    yield explain
    forget(triton, launch)


@pytest.mark.skipif(triton.unavailable() is not None, reason=str(triton.unavailable()))
@pytest.mark.skipif(not triton.interpreted(), reason="Triton compiles here")
def test_the_interpreter_runs_only_when_asked_for(ran):
    case = Case(tm.Mixing.released(), batch=1, num_heads=1)
    inputs = case.inputs(torch.float32)
    assert str(tm.explain(*inputs, case.mixing)) == (
        "eager: used, the default where nothing faster is measured\n"
        "triton: not used: slow under Triton's interpreter; request it by name"
    )
    compute(case)(*inputs)
    assert ran == []
    with tm.use_backend("triton"):
        assert str(tm.explain(*inputs, case.mixing)) == (
            "triton: used, requested by use_backend\neager: not used: another one comes first"
        )
        compute(case)(*inputs)
    assert ran == ["fwd_resident"]


def test_a_gpu_without_measurements_takes_eager(explained):
    assert str(explained()) == (
        "eager: used, the default where nothing faster is measured\n"
        "triton: not used: not measured to be the fastest for torch.float16 and head_dim 64 on "
        "sm_90; request it by name"
    )


@pytest.mark.parametrize(
    ("dtype", "head_dim", "chosen"),
    [
        (torch.float16, 64, "triton"),
        (torch.bfloat16, 40, "triton"),
        (torch.float16, 65, "eager"),
        (torch.float32, 64, "eager"),
    ],
    ids=str,
)
def test_a_measured_gpu_takes_triton_for_what_was_measured(explained, dtype, head_dim, chosen):
    measured = ({"dtype_bits": 16, "head_dim": 64},)
    explanation = explained(dtype=dtype, head_dim=head_dim, measured=measured)
    assert explanation.backend == chosen
    assert explanation.because == (
        "the first in the automatic order that suits the call"
        if chosen == "triton"
        else "the default where nothing faster is measured"
    )


REFUSALS = {
    "float64": (
        dict(dtype=torch.float64),
        "supports float16, bfloat16 and float32, got torch.float64",
    ),
    "temporal": (
        dict(mixing="temporal"),
        "does not support mixings whose keys depend on the query's token",
    ),
    "head_dim": (dict(head_dim=257), "head_dim is at most 256, got 257"),
    "device": (dict(device="cpu"), "needs tensors on a CUDA GPU, got cpu"),
}


@pytest.mark.parametrize("wrong", REFUSALS)
def test_what_it_cannot_compute_has_its_reason(explained, wrong):
    arguments, reason = REFUSALS[wrong]
    measured = tuple({"dtype_bits": bits, "head_dim": 512} for bits in (16, 32, 64))
    explanation = explained(**arguments, measured=measured)
    assert explanation.backend == "eager"
    assert explanation.others == {"triton": f"not used: {reason}"}
    with tm.use_backend("triton"), pytest.raises(RuntimeError) as error:
        explained(**arguments)
    assert str(error.value) == (
        f"backend 'triton' (use_backend) cannot compute this call: {reason}; request "
        "'eager', which can"
    )


@pytest.fixture
def forgetful():
    forget(triton)
    yield
    forget(triton)


def test_a_machine_that_cannot_run_it_says_what_is_missing(forgetful, monkeypatch):
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.unavailable() == (
        "no CUDA GPU (TRITON_INTERPRET=1 in the environment runs it on a CPU, very slowly)"
    )
    assert tm.available_backends() == ["eager"]
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    forget(triton)
    assert triton.unavailable() == "Triton is not installed; pip install 'tokenmix_ops[triton]'"


@pytest.mark.parametrize(
    ("versions", "fault"),
    [
        (
            {"triton": "3.6.0", "numpy": "2.4.0"},
            "the interpreter of Triton 3.6.0 fails with NumPy 2.4.0; pip install 'numpy<2.4'",
        ),
        ({"triton": "3.6.0", "numpy": "2.3.5"}, None),
        ({"triton": "3.7.1", "numpy": "2.5.2"}, None),
        ({"triton": "3.10.0", "numpy": "2.10.0"}, None),
    ],
)
def test_an_interpreter_that_fails_with_this_numpy_is_not_available(
    forgetful, monkeypatch, versions, fault
):
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    monkeypatch.setattr(triton, "version", versions.get)
    assert triton.unavailable() == fault
    # On a GPU nothing is interpreted.
    forget(triton)
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert triton.unavailable() is None
