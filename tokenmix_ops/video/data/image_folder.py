"""Lists and decodes the images of a folder of numbered images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import av
from av.video.frame import VideoFrame

from tokenmix_ops.video.data.errors import ClipError, configure
from tokenmix_ops.video.data.suffixes import is_image_name

_CODECS: dict[bytes, Literal["mjpeg", "png"]] = {b"\xff\xd8\xff": "mjpeg", b"\x89PNG": "png"}


def numbered_images(folder: Path) -> list[Path]:
    """List the images of a folder by the last number in their names.

    Raises ClipError if there are none, or if a name has no number or a duplicate one.
    """
    numbered: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        if not is_image_name(file.name) or file.name.startswith("."):
            continue
        digits = re.findall(r"[0-9]+", file.stem)
        if not digits:
            raise ClipError(f"{file}: needs a number in its name for ordering; rename or move it")
        other = numbered.setdefault(int(digits[-1]), file)
        if other != file:
            raise ClipError(f"{file}: has the same number as {other.name}; remove one of them")
    if not numbered:
        raise ClipError(f"{folder}: has no numbered .jpg, .jpeg or .png images")
    return [numbered[number] for number in sorted(numbered)]


def decode_image(file: Path) -> VideoFrame:
    """Decode a JPEG or PNG file; raise ClipError for other formats and damaged files."""
    data = file.read_bytes()
    codec = next((c for magic, c in _CODECS.items() if data.startswith(magic)), None)
    if codec is None:
        raise ClipError(f"{file}: is not a JPEG or PNG image")
    decoder = av.CodecContext.create(codec, "r")
    configure(decoder)
    try:
        frames = decoder.decode(av.Packet(data)) + decoder.decode(None)
    except av.FFmpegError as error:
        raise ClipError(f"{file}: is damaged: {error.strerror}") from error
    if not frames:
        raise ClipError(f"{file}: is damaged")
    return frames[0]
