"""The tuning methods of the paper's benchmark, and LoRA.

Names are imported when first used, so that settings can be read without any model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmix_ops.video.tuning.method import Switches, TuningMethod, VideoModel
    from tokenmix_ops.video.tuning.methods import METHODS, Tuned, apply, resolved, switches_of
    from tokenmix_ops.video.tuning.spec import MethodName, Tuning

__all__ = [
    "METHODS",
    "MethodName",
    "Switches",
    "Tuned",
    "Tuning",
    "TuningMethod",
    "VideoModel",
    "apply",
    "resolved",
    "switches_of",
]

_HOMES = {
    **dict.fromkeys(("METHODS", "Tuned", "apply", "resolved", "switches_of"), "methods"),
    **dict.fromkeys(("Switches", "TuningMethod", "VideoModel"), "method"),
    **dict.fromkeys(("MethodName", "Tuning"), "spec"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
