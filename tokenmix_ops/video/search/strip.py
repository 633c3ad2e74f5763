"""Small frames of a video as JPEG data."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
from av.video.frame import VideoFrame
from torch import Tensor

from tokenmix_ops.video.data.clips import ClipError, read_clip
from tokenmix_ops.video.data.image_folder import decode_image, numbered_images
from tokenmix_ops.video.data.video_file import read_frames

FRAMES = 8
_WIDTH, _HEIGHT = 224, 168
# On FFmpeg's scale of 1 to 31; lower is better.
_QUALITY = "4"


def frame_strip(path: Path) -> list[bytes]:
    """Return `FRAMES` uniformly chosen frames of a video as JPEG data.

    Frames keep their aspect ratio and shrink to at most 224 x 168 pixels. Raises ClipError as
    `read_clip` does.
    """
    width, height = _shown_size(path)
    return [_jpeg(image) for image in read_clip(path, FRAMES, (height, width))]


def _shown_size(path: Path) -> tuple[int, int]:
    try:
        if path.is_dir():
            frame = decode_image(numbered_images(path)[0])
        else:
            _, frame = next(iter(read_frames(path, _first)))
    except (av.FFmpegError, OSError) as error:
        raise ClipError(f"{path}: cannot be read: {error.strerror or error}") from error
    width, height = frame.width, frame.height
    if round(frame.rotation / 90) % 2:
        width, height = height, width
    scale = min(1.0, _WIDTH / width, _HEIGHT / height)
    return _even(width * scale), _even(height * scale)


def _first(count: int, times: Sequence[float] | None) -> dict[int, list[int]]:
    return {0: [0]}


def _even(length: float) -> int:
    """Round to an even length, because chroma is stored for every other pixel."""
    return max(2, 2 * round(length / 2))


def _jpeg(image: Tensor) -> bytes:
    """Encode RGB [3, height, width] in [0, 1] as JPEG."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.height, encoder.width = pixels.shape[:2]
    encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 1)
    encoder.thread_count = 1
    encoder.options = {"qmin": _QUALITY, "qmax": _QUALITY}
    frame = VideoFrame.from_ndarray(pixels, format="rgb24")
    frame = frame.reformat(format="yuvj420p", dst_color_range="JPEG")
    return b"".join(bytes(packet) for packet in (*encoder.encode(frame), *encoder.encode(None)))
