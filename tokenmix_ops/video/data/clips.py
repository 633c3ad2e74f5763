"""Reads chosen frames of a video file, or of a folder of numbered images, as a tensor."""

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

# Some files round times to whole milliseconds, so a frame's time may be slightly early.
_SLACK_SECONDS = 1e-3

# Exact to one level on a plain colour; swscale's default is off by two.
_SCALING = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def frame_indices(
    num_available: int,
    num_frames: int,
    sampling: str = "uniform",
    generator: torch.Generator | None = None,
) -> list[int]:
    """Choose `num_frames` ascending indices below `num_available`.

    "uniform" takes floor(i * num_available / num_frames); "random" draws distinct indices with
    `generator`. If there are too few frames, both repeat them by the uniform formula. Raises
    ValueError for counts below 1 and other samplings.
    """
    for name, value in (("num_available", num_available), ("num_frames", num_frames)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if sampling not in ("uniform", "random"):
        raise ValueError(f"sampling must be 'uniform' or 'random', got {sampling!r}")
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

    Returns [num_frames, 3, height, width]: upright frames, each resized without cropping (bicubic,
    antialiased) to `size`, an int or (height, width), and rounded to 8 bits per channel. `sampling`
    is "uniform" or "random"; a clip with too few frames repeats them. `start` and `end` are seconds
    after the video's first frame. `frame_indices` chooses among the frames with times in
    [start, end); with `fps`, only among the first frame at or after each start + k / fps for
    integer k, to a millisecond. A folder's images count as already sampled at `fps`. Reads the
    default video stream if there are several, else the largest. Raises ValueError for arguments out
    of range, and ClipError if the path is unusable, the file is cut off before `end`, or a chosen
    frame depends on data that the decoder reports as damaged; damage elsewhere is tolerated.
    """
    candidates = Candidates(Path(path), height_and_width(size), start, end, fps)
    return to_floats(read_chosen(candidates, Draw(num_frames, sampling, generator)))


def normalize_clip(clip: Tensor) -> Tensor:
    """Normalise RGB [..., 3, height, width] in [0, 1] with CLIP's mean and standard deviation.

    Raises ValueError for another shape, or for integers, which would be in [0, 255].
    """
    return normalize_clip_(clip.clone())


def normalize_clip_(clip: Tensor) -> Tensor:
    """Like `normalize_clip`, in place."""
    if not clip.is_floating_point():
        raise ValueError(
            f"expected clip to be floating point in [0, 1], got {clip.dtype}: divide by 255"
        )
    if clip.dim() < 3 or clip.shape[-3] != 3:
        raise ValueError(f"expected clip [..., 3, height, width], got {list(clip.shape)}")
    mean = clip.new_tensor(CLIP_MEAN).view(3, 1, 1)
    return clip.sub_(mean).div_(clip.new_tensor(CLIP_STD).view(3, 1, 1))


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size; raise ValueError if it is invalid."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"size must be an int or (height, width), each at least 1, got {size}")
    return sides[0], sides[1]


def to_floats(clip: Tensor) -> Tensor:
    """Convert 8-bit channels to float32 in [0, 1]."""
    return unfilled(clip.shape, torch.float32).copy_(clip).div_(255)


def unfilled(shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor:
    """Allocate a tensor whose memory returns to the system as soon as it is freed.

    On glibc's heap, memory would grow with each clip: PyTorch asks for aligned blocks, and glibc
    does not fit one into the hole left by another of the same size.
    """
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **flags)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


@dataclass(frozen=True)
class Candidates:
    """The frames to choose a clip from; see `read_clip`.

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
            raise ValueError(f"start must be at least 0 seconds, got {start}")
        if end is not None and not end > (start or 0):
            raise ValueError(f"end must be in seconds and above start = {start or 0}, got {end}")
        if fps is not None and not 0 < fps < math.inf:
            raise ValueError(f"fps must be above 0 and finite, got {fps}")

    def read(self, choose: Callable[[int], Iterable[int]]) -> Iterator[tuple[int, Tensor]]:
        """Yield the chosen candidates in order: index and RGB [3, height, width], uint8.

        `choose` receives the number of candidates. If decoding contradicts the file's packets,
        `choose` is called again and the frames restart from the first.
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
                raise ClipError(f"{path}: a folder of images has no timestamps: omit start and end")
            else:
                files = numbered_images(path)
                awaited.update(choose(len(files)))
                frames = (([number], decode_image(files[number])) for number in sorted(awaited))
            resized = _Resizer(self.size)
            for (number,), frame in frames:
                awaited.discard(number)
                # Resize at once, so that no full-size frame is kept.
                yield number, resized(frame)
        except (av.FFmpegError, OSError) as error:
            raise ClipError(f"{path}: cannot be read: {error.strerror or error}") from error
        if awaited:
            raise ClipError(f"{path}: changed while being read")

    def _window(self, count: int, times: Sequence[float] | None) -> Sequence[int]:
        """Return the positions of the candidates among all frames."""
        if self.start is None and self.end is None and self.fps is None:
            return range(count)
        if times is None:
            raise ClipError(
                f"{self.path}: start, end and fps need timestamps, which its frames lack; "
                "remux it, or omit them"
            )
        low, high = self.start or 0.0, math.inf if self.end is None else self.end
        window = [i for i, t in enumerate(times) if low <= t < high]
        if not window:
            last = max(t for t in times if t < low)
            raise ClipError(
                f"{self.path}: expected frames in [{low}, {high}) s, got none; the last one before "
                f"is at {last:.3f} s"
            )
        return window if self.fps is None else _at_rate(window, times, low, self.fps)


class Draw:
    """Assigns candidates to places of a clip; repeated calls draw the same.

    Raises ValueError for counts below 1 and unknown samplings.
    """

    def __init__(self, num_frames: int, sampling: str, generator: torch.Generator | None) -> None:
        frame_indices(1, num_frames, sampling)
        self.num_frames = num_frames
        self.sampling = sampling
        self.generator = torch.default_generator if generator is None else generator
        self.state: Tensor | None = None

    def __call__(self, count: int) -> dict[int, list[int]]:
        """Return places by candidate index, out of ``count`` candidates."""
        self.state = self.generator.get_state() if self.state is None else self.state
        self.generator.set_state(self.state)
        places: dict[int, list[int]] = {}
        numbers = frame_indices(count, self.num_frames, self.sampling, self.generator)
        for place, number in enumerate(numbers):
            places.setdefault(number, []).append(place)
        return places


def read_chosen(candidates: Candidates, draw: Draw) -> Tensor:
    """Read a clip, [num_frames, 3, height, width] uint8, decoding no more than it needs."""
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
    """Keep the first frames at or after each low + k / fps."""
    chosen: list[int] = []
    passed = -1
    for i in window:
        # No video exceeds this rate; a far higher one would overflow to infinity.
        reached = math.floor((times[i] - low + _SLACK_SECONDS) * min(fps, 1e9))
        if reached > passed:
            chosen.append(i)
            passed = reached
    return chosen


class _Resizer:
    """Converts frames to upright RGB images of one size, [3, height, width] uint8.

    Uses the frame's own colour matrix and range; FFmpeg defaults to BT.601, limited range.
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
