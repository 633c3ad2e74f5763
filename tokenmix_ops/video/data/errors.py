"""What reading videos and reading images share: how decoders treat damage, and the error."""

from __future__ import annotations

from av import CodecContext


class ClipError(ValueError):
    """A video or folder cannot give the frames asked for; names the path and the reason."""


def configure(decoder: CodecContext) -> None:
    """Make a decoder report damage and keep to one thread."""
    # Without "explode" decoders conceal much of the damage that they notice, and without
    # "crccheck" they do not compare the checksums that PNG, FFV1 and some HEVC have.
    decoder.options = {"err_detect": "crccheck+explode"}
    # Few frames are read at a time and data loaders run many workers: further threads would
    # compete with those, and frame threads decode ahead what is never shown.
    decoder.thread_count = 1
