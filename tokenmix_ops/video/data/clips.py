"""From the path of a video, or of a folder of numbered images, to a tensor of chosen frames."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from torch import Tensor
from torch.nn.functional import interpolate

from tokenmix_ops.video.data.errors import ClipError
from tokenmix_ops.video.data.image_folder import decode_image, numbered_images
from tokenmix_ops.video.data.video_file import read_frames

__all__ = ["CLIP_MEAN", "CLIP_STD", "ClipError", "frame_indices", "normalize_clip", "read_clip"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# In some files times are whole milliseconds, and a frame may be told to show too early.
_SLACK_SECONDS = 1e-3

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
    fps: float | None = None,
) -> Tensor:
    """Read chosen frames of a video file or image folder as float32 RGB in [0, 1].

    Returns [num_frames, 3, height, width]: upright frames, each resized without crop (bicubic,
    antialiased) to `size`, an int or (height, width), and rounded to 8 bits a channel. `sampling`
    is "uniform" or "random"; a clip with fewer frames than asked for repeats them. `start` and
    `end` are seconds after the video's first frame; `frame_indices` chooses among the frames
    whose time is in [start, end), and with `fps` among those only that, to a millisecond, are the
    first at or after start + k / fps for a whole k; images of a folder count as extracted at such
    a rate. Of several video streams the default one is read, then the largest. Raises ValueError
    for arguments out of range and ClipError for what is wrong with the path. A chosen frame that
    depends on data the decoder reports as damaged raises, and so does a file cut off before
    `end`; damage elsewhere is tolerated.
    """
    candidates = Candidates(Path(path), height_and_width(size), start, end, fps)
    return to_floats(read_chosen(candidates, Draw(num_frames, sampling, generator)))


def normalize_clip(clip: Tensor) -> Tensor:
    """Normalise RGB [..., 3, height, width] in [0, 1] by CLIP's mean and standard deviation.

    Raises ValueError for another shape, or for integers, which are in [0, 255].
    """
    return normalize_clip_(clip.clone())


def normalize_clip_(clip: Tensor) -> Tensor:
    """As `normalize_clip`, in place."""
    if not clip.is_floating_point():
        raise ValueError(
            f"clip is {clip.dtype}, it must be floating point in [0, 1]: divide by 255"
        )
    if clip.dim() < 3 or clip.shape[-3] != 3:
        raise ValueError(f"clip has shape {tuple(clip.shape)}, it must be [..., 3, height, width]")
    mean = clip.new_tensor(CLIP_MEAN).view(3, 1, 1)
    return clip.sub_(mean).div_(clip.new_tensor(CLIP_STD).view(3, 1, 1))


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Both sides of a size; raises ValueError for what is none."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"size is {size}, it must be an int or (height, width), each at least 1")
    return sides[0], sides[1]


def to_floats(clip: Tensor) -> Tensor:
    """8-bit channels as float32 in [0, 1]."""
    return unfilled(clip.shape, torch.float32).copy_(clip).div_(255)


def unfilled(shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor:
    """A tensor whose memory goes straight back to the system when it is no longer needed.

    Of glibc's heap each clip would take a new part: it aligns large blocks for PyTorch, and does
    not fit one into the hole that one of the same size has left.
    """
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **flags)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


@dataclass(frozen=True)
class Candidates:
    """The frames that a clip is chosen from, as `read_clip` describes them.

    Raises ValueError for times and rates out of range.
    """

    path: Path
    size: tuple[int, int]
    start: float | None = None
    end: float | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        start, end, fps = self.start, self.end, self.fps
        if start is not None and not 0 <= start < math.inf:
            raise ValueError(f"start is {start}, it must be in seconds, 0 or more")
        if end is not None and not end > (start or 0):
            raise ValueError(f"end is {end}, it must be in seconds, more than start, {start or 0}")
        if fps is not None and not 0 < fps < math.inf:
            raise ValueError(f"fps is {fps}, it must be in frames a second, above 0")

    def read(self, choose: Callable[[int], Iterable[int]]) -> Iterator[tuple[int, Tensor]]:
        """Yield chosen candidates in order, each its number and RGB [3, height, width], uint8.

        `choose` is given how many there are. Where decoding disagrees with what the file tells it
        is asked again, and the frames begin anew.
        """
        path, awaited = self.path, set[int]()

        def positions(count: int, times: Sequence[float] | None) -> dict[int, list[int]]:
            window = self._window(count, times)
            awaited.clear()
            awaited.update(choose(len(window)))
            return {window[number]: [number] for number in sorted(awaited)}

        try:
            if not path.is_dir():
                frames = read_frames(path, positions, math.inf if self.end is None else self.end)
            elif self.start is not None or self.end is not None:
                raise ClipError(
                    f"{path}: a folder of images has no clock, so start and end must be left out"
                )
            else:
                files = numbered_images(path)
                awaited.update(choose(len(files)))
                frames = (([number], decode_image(files[number])) for number in sorted(awaited))
            resized = _Resizer(self.size)
            for (number,), frame in frames:
                awaited.discard(number)
                # Resized as it comes, so that no full-size frame is kept.
                yield number, resized(frame)
        except (av.FFmpegError, OSError) as error:
            raise ClipError(f"{path}: cannot be read: {error.strerror or error}") from error
        if awaited:
            raise ClipError(f"{path}: changed while it was read")

    def _window(self, count: int, times: Sequence[float] | None) -> Sequence[int]:
        """Positions of the candidates among all frames."""
        if self.start is None and self.end is None and self.fps is None:
            return range(count)
        if times is None:
            raise ClipError(
                f"{self.path}: start, end and fps need timestamps, which its frames lack; "
                "remux it, or leave them out"
            )
        low, high = self.start or 0.0, math.inf if self.end is None else self.end
        window = [i for i, t in enumerate(times) if low <= t < high]
        if not window:
            last = max(t for t in times if t < low)
            raise ClipError(
                f"{self.path}: no frame has its time in [{low}, {high}) s; the last before is at "
                f"{last:.3f} s"
            )
        return window if self.fps is None else _at_rate(window, times, low, self.fps)


class Draw:
    """Which candidates fill which places of a clip, the same however often it is asked for.

    Raises ValueError for counts below 1 and unknown samplings.
    """

    def __init__(self, num_frames: int, sampling: str, generator: torch.Generator | None) -> None:
        frame_indices(1, num_frames, sampling)
        self.num_frames = num_frames
        self.sampling = sampling
        self.generator = torch.default_generator if generator is None else generator
        self.state: Tensor | None = None

    def __call__(self, count: int) -> dict[int, list[int]]:
        """Places by the number of the candidate, of which there are ``count``."""
        self.state = self.generator.get_state() if self.state is None else self.state
        self.generator.set_state(self.state)
        places: dict[int, list[int]] = {}
        numbers = frame_indices(count, self.num_frames, self.sampling, self.generator)
        for place, number in enumerate(numbers):
            places.setdefault(number, []).append(place)
        return places


def read_chosen(candidates: Candidates, draw: Draw) -> Tensor:
    """Read a clip, [num_frames, 3, height, width] uint8, and nothing that it does not need."""
    clip = unfilled((draw.num_frames, 3, *candidates.size))
    places: dict[int, list[int]] = {}

    def choose(count: int) -> Iterable[int]:
        nonlocal places
        places = draw(count)
        return places

    for number, image in candidates.read(choose):
        clip[places[number]] = image
    return clip


def _at_rate(
    window: Sequence[int], times: Sequence[float], low: float, fps: float
) -> Sequence[int]:
    """Those of a window that are first at or after some low + k / fps."""
    chosen: list[int] = []
    passed = -1
    for i in window:
        # No video has as many frames a second; far more would be infinity.
        reached = math.floor((times[i] - low + _SLACK_SECONDS) * min(fps, 1e9))
        if reached > passed:
            chosen.append(i)
            passed = reached
    return chosen


class _Resizer:
    """Makes frames upright RGB images of one size, [3, height, width] uint8.

    Matrix and range are the frame's own; where it names none, FFmpeg takes BT.601, limited.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.reformatter = VideoReformatter()
        self.floats = unfilled((3, 1, 1), torch.float32)

    def __call__(self, frame: VideoFrame) -> Tensor:
        rgb = self.reformatter.reformat(frame, format="rgb24", interpolation=_SCALING, threads=1)
        plane = rgb.planes[0]
        rows = torch.frombuffer(plane, dtype=torch.uint8).view(-1, plane.line_size)
        pixels = rows[: rgb.height, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3)
        image = torch.rot90(pixels, round(frame.rotation / 90)).permute(2, 0, 1)
        if self.floats.shape != image.shape:
            self.floats = unfilled(image.shape, torch.float32)
        self.floats.copy_(image)
        resized = interpolate(self.floats[None], self.size, mode="bicubic", antialias=True)[0]
        return resized.clamp_(0, 255).round_().to(torch.uint8)
