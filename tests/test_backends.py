"""Which backend runs: who asks, who refuses, and what is said about it."""

import threading
from types import SimpleNamespace

import pytest
import torch

import tokenmix_ops as tm
from tokenmix_ops import backends
from tokenmix_ops.testing import Case

CASE = Case(tm.Mixing.released())
DEFAULT = "the default where nothing faster is measured"


@pytest.fixture
def picky(monkeypatch):
    """A faster backend that computes nothing but float32, and notes that it was called."""
    eager = backends.BACKENDS["eager"]
    module = SimpleNamespace(name="picky", calls=0)

    def compute(*arguments):
        module.calls += 1
        return eager.token_mix_attention(*arguments)

    module.unavailable = lambda: None
    module.not_preferred = lambda q, k, v, plan: None
    module.unsupported = lambda q, k, v, plan: None if q.dtype == torch.float32 else "only float32"
    module.token_mix_attention = compute
    monkeypatch.setattr(backends, "BACKENDS", {"picky": module, "eager": eager})
    return module


def call(dtype=torch.float32, **arguments):
    return tm.token_mix_attention(*CASE.inputs(dtype), mixing=CASE.mixing, **arguments)


def test_the_first_that_can_is_chosen(picky):
    call()
    assert picky.calls == 1
    call(torch.float64)
    assert picky.calls == 1


def test_argument_beats_context_beats_environment(picky, monkeypatch):
    monkeypatch.setenv("TOKENMIX_BACKEND", "eager")
    call()
    assert picky.calls == 0
    with tm.use_backend("picky"):
        call()
        assert picky.calls == 1
        with tm.use_backend("eager"):
            call()
        call(backend="eager")
        assert picky.calls == 1
    call(backend="picky")
    assert picky.calls == 2


def test_a_request_that_cannot_be_met_raises_and_names_a_backend_that_can(picky):
    text = (
        "backend 'picky' (argument backend) cannot compute this call: only float32; request "
        "'eager', which can"
    )
    with pytest.raises(RuntimeError) as error:
        call(torch.float64, backend="picky")
    assert str(error.value) == text
    with tm.use_backend("picky"), pytest.raises(RuntimeError, match="use_backend"):
        call(torch.float64)


def test_no_backend_at_all_lists_every_reason(picky, monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", {"picky": picky})
    with pytest.raises(RuntimeError) as error:
        call(torch.float64)
    assert str(error.value) == "no backend can compute this call:\npicky: only float32"


def test_unknown_names_are_errors_wherever_they_come_from(monkeypatch):
    with (
        pytest.raises(
            ValueError,
            match=r"unknown backend 'fast' \(use_backend\); known: 'triton', 'cpu', 'eager'",
        ),
        tm.use_backend("fast"),
    ):
        pass
    monkeypatch.setenv("TOKENMIX_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"'fast' \(environment variable TOKENMIX"):
        call()
    monkeypatch.setenv("TOKENMIX_BACKEND", "")
    call()


def test_explain_names_the_chosen_one_and_why_not_the_others(picky):
    explained = tm.explain(*CASE.inputs(torch.float64), CASE.mixing)
    assert explained.backend == "eager"
    assert explained.others == {"picky": "not used: only float32"}
    assert str(explained) == f"eager: used, {DEFAULT}\npicky: not used: only float32"
    explained = tm.explain(*CASE.inputs(torch.float32), CASE.mixing)
    because = "the first in the automatic order that suits the call"
    assert str(explained).startswith(f"picky: used, {because}\neager: not used: ")
    explained = tm.explain(*CASE.inputs(torch.float32), CASE.mixing, backend="eager")
    assert str(explained).splitlines() == [
        "eager: used, requested by argument backend",
        "picky: not used: another one comes first",
    ]


def test_a_request_is_undone_after_an_error_and_does_not_leave_its_thread(picky):
    with pytest.raises(KeyError), tm.use_backend("eager"):
        raise KeyError
    seen = []
    with tm.use_backend("eager"):
        other = threading.Thread(target=lambda: seen.append(call()))
        other.start()
        other.join()
    assert picky.calls == 1


def test_what_the_environment_requests_is_said_with_why_it_cannot_be_met(picky, monkeypatch):
    monkeypatch.delenv("TOKENMIX_BACKEND", raising=False)
    assert backends.environment_request() is None
    monkeypatch.setenv("TOKENMIX_BACKEND", "picky")
    request = "TOKENMIX_BACKEND requests 'picky' for every call"
    assert backends.environment_request() == request
    picky.unavailable = lambda: "needs a screwdriver"
    assert backends.environment_request() == (
        f"{request}, which will raise an error: needs a screwdriver"
    )
    monkeypatch.setenv("TOKENMIX_BACKEND", "fast")
    assert backends.environment_request() == (
        "unknown backend 'fast' (environment variable TOKENMIX_BACKEND); known: 'picky', 'eager'; "
        "every call will raise this error"
    )


def test_what_does_not_pay_runs_only_when_asked_for(picky):
    picky.not_preferred = lambda q, k, v, plan: "slow here"
    explained = tm.explain(*CASE.inputs(torch.float32), CASE.mixing)
    assert str(explained) == f"eager: used, {DEFAULT}\npicky: not used: slow here"
    call()
    assert picky.calls == 0
    call(backend="picky")
    assert picky.calls == 1


def test_the_backends_of_this_machine():
    assert list(backends.BACKENDS) == ["triton", "cpu", "eager"]
    report = backends.machine_report()
    assert report["eager"] is None
    assert tm.available_backends() == [name for name in report if report[name] is None]
