"""The backends, and the choice among them for each call.

A backend is a module that implements `Backend`. Importing one requires only PyTorch; it looks for
anything else (a compiler, a GPU, a built library) when called, and reports what is missing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from tokenmix_ops.backends import cpu, eager, triton
from tokenmix_ops.plan import Plan

VARIABLE = "TOKENMIX_BACKEND"


class Backend(Protocol):
    name: str

    def unavailable(self) -> str | None: ...

    def unsupported(self, query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None: ...

    def not_preferred(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Plan
    ) -> str | None: ...

    def token_mix_attention(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float
    ) -> Tensor: ...


BACKENDS: dict[str, Backend] = {
    module.name: cast(Backend, module) for module in (triton, cpu, eager)
}
"""In the order of the automatic choice; the one that always works is last."""


@dataclass(frozen=True)
class Explanation:
    """Which backend is used, why, and why each of the others is not."""

    backend: str
    because: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: used, {self.because}"]
        return "\n".join(lines + [f"{name}: {reason}" for name, reason in self.others.items()])


class _Requests(threading.local):
    stack: tuple[str, ...] = ()


# Thread-local rather than a ContextVar, which torch.compile cannot read.
_requests = _Requests()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Requests a backend for all calls of this thread inside the ``with`` block.

    It overrides the environment variable TOKENMIX_BACKEND; an argument ``backend=`` overrides both.
    Raises ValueError if no backend has that name. Each call checks whether the backend supports it.
    """
    check_name(name)
    previous = _requests.stack
    _requests.stack = (*previous, name)
    try:
        yield
    finally:
        _requests.stack = previous


def available() -> list[str]:
    """Names of the backends that can run on this machine, the preferred one first."""
    return [name for name in BACKENDS if BACKENDS[name].unavailable() is None]


def select(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, requested: str | None = None
) -> Backend:
    """Returns the requested backend, or else the first that supports the call and is worth using.

    Raises ValueError for an unknown name, RuntimeError if the requested backend cannot compute the
    call. Never falls back silently from an explicit request.
    """
    requested, source = request(requested)
    if requested is None:
        for name in BACKENDS:
            if _passed_over(name, query, key, value, plan) is None:
                return BACKENDS[name]
    else:
        refusal = _refusal(requested, query, key, value, plan)
        if refusal is None:
            return BACKENDS[requested]
        able = [n for n in BACKENDS if _refusal(n, query, key, value, plan) is None]
        raise RuntimeError(
            f"backend {requested!r} ({source}) cannot compute this call: {refusal}; "
            + (f"request {able[0]!r}, which can" if able else "no other can")
        )
    reasons = [f"{name}: {_passed_over(name, query, key, value, plan)}" for name in BACKENDS]
    raise RuntimeError("no backend can compute this call:\n" + "\n".join(reasons))


def explain(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, requested: str | None = None
) -> Explanation:
    """Says which backend `select` would return, and why not the others."""
    chosen = select(query, key, value, plan, requested).name
    requested, source = request(requested)
    if requested is not None:
        because = f"requested by {source}"
    elif chosen == list(BACKENDS)[-1]:
        because = "the default where nothing faster is measured"
    else:
        because = "the first in the automatic order that suits the call"
    others = {}
    for name in BACKENDS:
        if name != chosen:
            reason = _passed_over(name, query, key, value, plan)
            others[name] = f"not used: {reason or 'another one comes first'}"
    return Explanation(chosen, because, others)


def machine_report() -> dict[str, str | None]:
    """Returns why each backend cannot run on this machine, or None if it can."""
    return {name: BACKENDS[name].unavailable() for name in BACKENDS}


def environment_request() -> str | None:
    """Says what TOKENMIX_BACKEND requests of every call, and why that cannot be met; None if it is
    not set."""
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    try:
        check_name(name, f"environment variable {VARIABLE}")
    except ValueError as error:
        return f"{error}; every call will raise this error"
    request = f"{VARIABLE} requests {name!r} for every call"
    reason = BACKENDS[name].unavailable()
    return f"{request}, which will raise an error: {reason}" if reason else request


def request(argument: str | None) -> tuple[str | None, str]:
    """Returns the name of the requested backend, None if nobody requests one, and who does.

    Raises ValueError for an unknown name.
    """
    if argument is not None:
        name, source = argument, "argument backend"
    elif _requests.stack:
        name, source = _requests.stack[-1], "use_backend"
    else:
        name, source = os.environ.get(VARIABLE, ""), f"environment variable {VARIABLE}"
    if not name:
        return None, "nobody"
    check_name(name, source)
    return name, source


def check_name(name: str, source: str = "use_backend") -> None:
    """Raises ValueError, naming the ``source`` of the request, unless a backend has that name."""
    if name not in BACKENDS:
        raise ValueError(
            f"unknown backend {name!r} ({source}); known: {', '.join(map(repr, BACKENDS))}"
        )


def _refusal(name: str, query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    backend = BACKENDS[name]
    return backend.unavailable() or backend.unsupported(query, key, value, plan)


def _passed_over(name: str, query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    """Why the automatic choice skips a backend; None if it may use it."""
    refusal = _refusal(name, query, key, value, plan)
    return refusal or BACKENDS[name].not_preferred(query, key, value, plan)
