"""The thin video-language stack around the attention; needs the ``video`` extra.

Imports are lazy, so using one part does not pull in another part's dependencies.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmix_ops.video.blip import blip_vision_config
    from tokenmix_ops.video.data.cache import FrameCache
    from tokenmix_ops.video.data.clips import ClipError, normalize_clip, read_clip
    from tokenmix_ops.video.data.manifest import read_manifest, write_manifest
    from tokenmix_ops.video.encoder import VideoEncoder, VideoEncoding
    from tokenmix_ops.video.metrics.captions import caption_scores
    from tokenmix_ops.video.metrics.recall import retrieval_scores

__all__ = [
    "ClipError",
    "FrameCache",
    "VideoEncoder",
    "VideoEncoding",
    "blip_vision_config",
    "caption_scores",
    "normalize_clip",
    "read_clip",
    "read_manifest",
    "retrieval_scores",
    "write_manifest",
]

_HOMES = {
    "ClipError": "tokenmix_ops.video.data.clips",
    "FrameCache": "tokenmix_ops.video.data.cache",
    "VideoEncoder": "tokenmix_ops.video.encoder",
    "VideoEncoding": "tokenmix_ops.video.encoder",
    "blip_vision_config": "tokenmix_ops.video.blip",
    "caption_scores": "tokenmix_ops.video.metrics.captions",
    "normalize_clip": "tokenmix_ops.video.data.clips",
    "read_clip": "tokenmix_ops.video.data.clips",
    "read_manifest": "tokenmix_ops.video.data.manifest",
    "retrieval_scores": "tokenmix_ops.video.metrics.recall",
    "write_manifest": "tokenmix_ops.video.data.manifest",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tokenmix_ops"):
            raise
        raise ModuleNotFoundError(
            f"tokenmix_ops.video.{name} needs {error.name!r}: pip install 'tokenmix_ops[video]'",
            name=error.name,
        ) from error
