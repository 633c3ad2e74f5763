"""The ways of computing token-mixing attention, and which of them a call uses.

A backend is a module with ``name``, ``unavailable()``, ``unsupported(query, key, value, plan)``,
``not_preferred(query, key, value, plan)`` and ``token_mix_attention(query, key, value, plan,
scale)``. Importing one needs nothing but PyTorch:
what else it stands on (a compiler, a GPU, a built library) it looks for when asked, and says what
is missing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from tokenmix_ops.backends import eager, triton
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


BACKENDS: dict[str, Backend] = {module.name: cast(Backend, module) for module in (triton, eager)}
"""From the fastest to the one that always works: the order of the automatic choice."""


@dataclass(frozen=True)
class Explanation:
    """Which backend is used, why, and why each other one is not."""

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

    An argument ``backend=`` overrides it; it overrides the environment variable TOKENMIX_BACKEND.
    Raises ValueError if no backend has that name. Whether it can serve a call shows at the call.
    """
    check_name(name)
    previous = _requests.stack
    _requests.stack = (*previous, name)
    try:
        yield
    finally:
        _requests.stack = previous


def available() -> list[str]:
    """Names of the backends that this machine can run, the preferred one first."""
    return [name for name in BACKENDS if BACKENDS[name].unavailable() is None]


def select(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, requested: str | None = None
) -> Backend:
    """The backend for a call: the requested one, else the first that can and is known to pay.

    Raises ValueError for an unknown name, RuntimeError if the requested one cannot compute the
    call; a request is never replaced by another backend in silence.
    """
    requested, source = _request(requested)
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
            f"nearest that can: {able[0] if able else 'none'}"
        )
    reasons = [f"{name}: {_passed_over(name, query, key, value, plan)}" for name in BACKENDS]
    raise RuntimeError("no backend can compute this call:\n" + "\n".join(reasons))


def explain(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, requested: str | None = None
) -> Explanation:
    """What `select` would answer, and why each other backend would not run."""
    chosen = select(query, key, value, plan, requested).name
    requested, source = _request(requested)
    because = "the fastest known" if requested is None else f"requested by {source}"
    others = {}
    for name in BACKENDS:
        if name != chosen:
            reason = _passed_over(name, query, key, value, plan)
            others[name] = f"not used: {reason or 'another one comes first'}"
    return Explanation(chosen, because, others)


def machine_report() -> dict[str, str | None]:
    """Each backend's reason for not running on this machine, None if it can."""
    return {name: BACKENDS[name].unavailable() for name in BACKENDS}


def _request(argument: str | None) -> tuple[str | None, str]:
    """The requested backend's name and what asked for it."""
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
    """ValueError unless a backend has that name; ``source`` is who asked for it."""
    if name not in BACKENDS:
        raise ValueError(
            f"unknown backend {name!r} ({source}); known: {', '.join(map(repr, BACKENDS))}"
        )


def _refusal(name: str, query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    backend = BACKENDS[name]
    return backend.unavailable() or backend.unsupported(query, key, value, plan)


def _passed_over(name: str, query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    """Why the automatic choice does not take a backend; None if it may."""
    refusal = _refusal(name, query, key, value, plan)
    return refusal or BACKENDS[name].not_preferred(query, key, value, plan)
