"""From the path of a video, or of a folder of numbered images, to a tensor of chosen frames."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import av
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from torch import Tensor
from torch.nn.functional import interpolate

from tokenmix_ops.video.data.decoder import ClipError
from tokenmix_ops.video.data.image_folder import decode_image, numbered_images
from tokenmix_ops.video.data.video_file import read_frames

__all__ = ["CLIP_MEAN", "CLIP_STD", "ClipError", "frame_indices", "normalize_clip", "read_clip"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Exact to one level on a plain colour, where swscale's default is off by two.
_SCALING = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def frame_indices(
    num_available: int,
    num_frames: int,
    sampling: str = "uniform",
    generator: torch.Generator | None = None,
) -> list[int]:
    """Choose `num_frames` ascending indices below `num_available`.

    "uniform" takes floor(i * num_available / num_frames), "random" distinct ones drawn with
    `generator`; where there are too few frames both repeat them by the uniform formula. Raises
    ValueError for counts below 1 and other samplings.
    """
    for name, value in (("num_available", num_available), ("num_frames", num_frames)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}, it must be a whole number, at least 1")
    if sampling not in ("uniform", "random"):
        raise ValueError(f"sampling is {sampling!r}, it must be 'uniform' or 'random'")
    if sampling == "random" and num_available >= num_frames:
        return sorted(torch.randperm(num_available, generator=generator)[:num_frames].tolist())
    return [i * num_available // num_frames for i in range(num_frames)]


def read_clip(
    path: str | os.PathLike[str],
    num_frames: int = 8,
    size: int | tuple[int, int] = 224,
    sampling: str = "uniform",
    start: float | None = None,
    end: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Read chosen frames of a video file or image folder as float32 RGB in [0, 1].

    Returns [num_frames, 3, height, width]: upright frames, each resized without crop (bicubic,
    antialiased) to `size`, an int or (height, width). `sampling` is "uniform" or "random"; a clip
    with fewer frames than asked for repeats them. `start` and `end` are seconds after the
    video's first frame; `frame_indices` chooses among the frames whose time is in [start, end).
    Of several video streams the default one is read, then the largest. Raises ValueError for
    arguments out of range and ClipError for what is wrong with the path. A chosen frame that
    depends on data the decoder reports as damaged raises, and so does a file cut off before
    `end`; damage elsewhere is tolerated.
    """
    height, width = _height_and_width(size)
    frame_indices(1, num_frames, sampling)
    _check_span(start, end)
    path = Path(path)
    rng = torch.default_generator if generator is None else generator
    state: Tensor | None = None

    def choose(count: int, times: Sequence[float] | None) -> dict[int, list[int]]:
        nonlocal state
        window = _window(path, count, times, start, end)
        # Whoever asks again is given the same draw.
        state = rng.get_state() if state is None else state
        rng.set_state(state)
        slots: dict[int, list[int]] = {}
        for slot, i in enumerate(frame_indices(len(window), num_frames, sampling, rng)):
            slots.setdefault(window[i], []).append(slot)
        return slots

    try:
        if not path.is_dir():
            frames = read_frames(path, choose, float("inf") if end is None else end)
        elif start is not None or end is not None:
            raise ClipError(
                f"{path}: a folder of images has no clock, so start and end must be left out"
            )
        else:
            files = numbered_images(path)
            chosen = choose(len(files), None)
            frames = ((slots, decode_image(files[i])) for i, slots in chosen.items())
        out = torch.empty(num_frames, 3, height, width)
        reformatter = VideoReformatter()
        for slots, frame in frames:
            # Resized as it comes, so that no full-size frame is kept.
            out[slots] = _to_image(frame, (height, width), reformatter)
    except (av.FFmpegError, OSError) as error:
        raise ClipError(f"{path}: cannot be read: {error.strerror or error}") from error
    return out


def normalize_clip(clip: Tensor) -> Tensor:
    """Normalise RGB [..., 3, height, width] in [0, 1] by CLIP's mean and standard deviation.

    Raises ValueError for another shape, or for integers, which are in [0, 255].
    """
    if not clip.is_floating_point():
        raise ValueError(
            f"clip is {clip.dtype}, it must be floating point in [0, 1]: divide by 255"
        )
    if clip.dim() < 3 or clip.shape[-3] != 3:
        raise ValueError(f"clip has shape {tuple(clip.shape)}, it must be [..., 3, height, width]")
    mean = clip.new_tensor(CLIP_MEAN).view(3, 1, 1)
    return (clip - mean) / clip.new_tensor(CLIP_STD).view(3, 1, 1)


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"size is {size}, it must be an int or (height, width), each at least 1")
    return sides[0], sides[1]


def _check_span(start: float | None, end: float | None) -> None:
    if start is not None and not 0 <= start < float("inf"):
        raise ValueError(f"start is {start}, it must be in seconds, 0 or more")
    if end is not None and not end > (start or 0):
        raise ValueError(f"end is {end}, it must be in seconds, more than start, {start or 0}")


def _window(
    path: Path,
    count: int,
    times: Sequence[float] | None,
    start: float | None,
    end: float | None,
) -> Sequence[int]:
    """Positions of the frames in [start, end)."""
    if start is None and end is None:
        return range(count)
    if times is None:
        raise ClipError(
            f"{path}: start and end need timestamps, which its frames lack; "
            "remux it, or leave them out"
        )
    low, high = start or 0.0, float("inf") if end is None else end
    window = [i for i, t in enumerate(times) if low <= t < high]
    if not window:
        last = max(t for t in times if t < low)
        raise ClipError(
            f"{path}: no frame has its time in [{low}, {high}) s; the last before is at "
            f"{last:.3f} s"
        )
    return window


def _to_image(frame: VideoFrame, size: tuple[int, int], reformatter: VideoReformatter) -> Tensor:
    """RGB [3, height, width] in [0, 1], upright.

    Matrix and range are the frame's own; where it names none, FFmpeg takes BT.601, limited.
    """
    rgb = reformatter.reformat(frame, format="rgb24", interpolation=_SCALING, threads=1)
    plane = rgb.planes[0]
    rows = torch.frombuffer(plane, dtype=torch.uint8).view(-1, plane.line_size)
    pixels = rows[: rgb.height, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3)
    upright = torch.rot90(pixels, round(frame.rotation / 90))
    image = upright.permute(2, 0, 1).contiguous().float().div_(255)
    return interpolate(image[None], list(size), mode="bicubic", antialias=True)[0].clamp_(0, 1)
