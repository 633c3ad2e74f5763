"""A synthetic data set: short clips of moving shapes whose meaning is the order of the frames.

Each clip shows one coloured shape that moves left, right, up or down, and a caption that says so.
Single frames do not reveal the motion: a clip and its reverse hold the same frames, and a random
frame has the same distribution for all four motions (`sample_scenes`). A model that averages a
linear function of each frame can therefore only guess: its cross-entropy is at least log 4, by
Jensen's inequality.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import av
import torch
from torch import Tensor

from tokenmix_ops.video.data.manifest import Video, write_manifest
from tokenmix_ops.video.files import replace_text, replacing

MOTIONS = ("left", "right", "up", "down")
SHAPES = ("circle", "square", "diamond", "triangle")
COLOURS = {
    "red": (0.90, 0.20, 0.15),
    "green": (0.20, 0.75, 0.25),
    "blue": (0.25, 0.45, 0.95),
    "yellow": (0.95, 0.85, 0.20),
    "purple": (0.65, 0.30, 0.85),
    "white": (0.95, 0.95, 0.95),
}

DESCRIPTION = "moving shapes"
"""The ``info`` description in the annotations of a world."""

_MARGIN = 0.20
_SPAN = (0.45, 0.55)


@dataclass(frozen=True)
class Scenes:
    """The content of a batch of clips; lengths are fractions of the image side."""

    motion: Tensor
    """int64 [batch], index into `MOTIONS`."""
    shape: Tensor
    """int64 [batch], index into `SHAPES`."""
    colour: Tensor
    """int64 [batch], index into `COLOURS`."""
    background: Tensor
    """[batch, 3], RGB in 0..1."""
    radius: Tensor
    """[batch]."""
    position: Tensor
    """[batch, num_frames, 2], x and y of the shape's centre, y downwards."""

    def captions(self, index: int) -> list[str]:
        """Return two captions of clip ``index``."""
        motion = MOTIONS[int(self.motion[index])]
        thing = self._thing(index)
        ways = {
            "left": "from right to left",
            "right": "from left to right",
            "up": "from bottom to top",
            "down": "from top to bottom",
        }
        return [f"a {thing} moves {motion}", f"the {thing} goes {ways[motion]}"]

    def still_captions(self, index: int) -> list[str]:
        """Return two captions of the first frame of clip ``index``."""
        thing = self._thing(index)
        x, y = self.position[index, 0].tolist()
        return [
            f"a {thing} on the {'left' if x < 0.5 else 'right'}",
            f"there is a {thing} at the {'top' if y < 0.5 else 'bottom'}",
        ]

    def stopped(self, generator: torch.Generator) -> Scenes:
        """Return the same shapes, each frozen at its position in a random frame."""
        count, num_frames, _ = self.position.shape
        frame = torch.randint(num_frames, (count,), generator=generator)
        position = self.position[torch.arange(count), frame]
        return replace(self, position=position[:, None].expand(-1, num_frames, -1))

    def _thing(self, index: int) -> str:
        return f"{list(COLOURS)[int(self.colour[index])]} {SHAPES[int(self.shape[index])]}"


def sample_scenes(count: int, num_frames: int, generator: torch.Generator) -> Scenes:
    """Draw ``count`` scenes of ``num_frames`` frames each.

    The static coordinate is drawn like the moving one at a random frame, so that the position in a
    random frame has the same distribution for every motion.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def choice(options: int) -> Tensor:
        return torch.randint(options, (count,), generator=generator)

    time = torch.linspace(0.0, 1.0, num_frames)
    motion = choice(len(MOTIONS))
    span = uniform(*_SPAN)
    start = _MARGIN + (1 - 2 * _MARGIN - span[:, None]) * uniform(0, 1, 2)
    backwards = (motion % 2 == 0)[:, None]
    moving = torch.where(backwards, 1 - time, time)
    still = time[choice(num_frames)][:, None].expand(-1, num_frames)
    horizontal = (motion < 2)[:, None]
    along = torch.stack(
        [torch.where(horizontal, moving, still), torch.where(horizontal, still, moving)], dim=-1
    )
    return Scenes(
        motion=motion,
        shape=choice(len(SHAPES)),
        colour=choice(len(COLOURS)),
        background=uniform(0.0, 0.25, 3),
        radius=uniform(0.16, 0.20),
        position=start[:, None] + span[:, None, None] * along,
    )


def render(scenes: Scenes, size: int) -> Tensor:
    """Render frames [batch, num_frames, 3, size, size], RGB in 0..1, with antialiased edges."""
    axis = (torch.arange(size) + 0.5) / size
    x = axis - scenes.position[..., 0, None, None]
    y = axis[:, None] - scenes.position[..., 1, None, None]
    radius = scenes.radius[:, None, None, None]
    slope = math.sqrt(3.0)
    distance = torch.empty(*scenes.position.shape[:2], size, size)
    outlines: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "circle": lambda x, y, r: torch.hypot(x, y) - r,
        "square": lambda x, y, r: torch.maximum(x.abs(), y.abs()) - 0.85 * r,
        "diamond": lambda x, y, r: (x.abs() + y.abs() - 1.2 * r) / math.sqrt(2.0),
        "triangle": lambda x, y, r: torch.maximum(y - 0.7 * r, (slope * x.abs() - y) / 2 - 0.6 * r),
    }
    for index, name in enumerate(SHAPES):
        chosen = scenes.shape == index
        distance[chosen] = outlines[name](x[chosen], y[chosen], radius[chosen])
    coverage = (0.5 - distance * size).clamp(0.0, 1.0).unsqueeze(2)
    colour = torch.tensor(list(COLOURS.values()))[scenes.colour][:, None, :, None, None]
    background = scenes.background[:, None, :, None, None]
    return torch.lerp(background, colour, coverage)


def write_video(path: str | os.PathLike[str], frames: Tensor, fps: int) -> None:
    """Write frames [num_frames, 3, height, width], RGB in 0..1, as an H.264 file.

    Raises ValueError unless height and width are even, OSError if it cannot be written.
    """
    if frames.dim() != 4 or frames.shape[1] != 3 or frames.shape[2] % 2 or frames.shape[3] % 2:
        raise ValueError(
            f"frames must be [num_frames, 3, even height, even width], got {list(frames.shape)}"
        )
    pictures = (frames * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with av.open(os.fspath(path), "w", format="mp4") as container:
        # Make the output reproducible: one thread, and a fixed quantiser, because the look-ahead of
        # rate control varies between runs on AVX-512 machines.
        options = {"qp": "16", "threads": "1", "x264-params": "weightp=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[2], frames.shape[3]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_world(
    folder: str | os.PathLike[str],
    num_videos: int = 64,
    *,
    seed: int = 0,
    num_frames: int = 8,
    size: int = 112,
    fps: int = 4,
    still: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write clips as ``videos/video<i>.mp4``, and their captions in two formats.

    The formats are a manifest, ``videos.jsonl``, and MSR-VTT's annotations, ``annotations.json``.
    With ``still``, shapes do not move and captions give only their place, which stands in for
    image-language pre-training. The same seed gives the same files. The splits are 80 % train, 10 %
    val, 10 % test. Replaces an earlier world in the folder; until everything is written,
    ``annotations.json`` lists no videos and ``videos.jsonl`` does not exist. Calls ``progress``
    with the number of clips done. Returns the path of ``annotations.json``. Raises ValueError for
    invalid sizes or a folder with other videos, OSError if it cannot write.
    """
    for name, value, least in (
        ("num_videos", num_videos, 1),
        ("num_frames", num_frames, 2),
        ("size", size, 16),
        ("fps", fps, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if size % 2:
        raise ValueError(f"size must be even, got {size}")
    videos_folder = Path(folder) / "videos"
    videos_folder.mkdir(parents=True, exist_ok=True)
    path = Path(folder) / "annotations.json"
    info = {"description": DESCRIPTION, "seed": seed, "size": size, "num_frames": num_frames}
    manifest = Path(folder) / "videos.jsonl"
    old = list(videos_folder.iterdir())
    if not _is_world(path):
        if old:
            raise ValueError(f"{videos_folder} holds other files: choose another folder")
        if manifest.exists():
            raise ValueError(f"{manifest} already exists: choose another folder")
    # Remove the earlier world first, so that an interrupted run leaves no mixture.
    manifest.unlink(missing_ok=True)
    _write_annotations(path, info, [], [])
    for file in old:
        file.unlink()
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(num_videos, num_frames, generator)
    scenes = scenes.stopped(generator) if still else scenes
    videos: list[dict[str, object]] = []
    sentences: list[dict[str, object]] = []
    lines: list[Video] = []
    for index in range(num_videos):
        one = Scenes(**{name: value[index : index + 1] for name, value in vars(scenes).items()})
        file = videos_folder / f"video{index}.mp4"
        with replacing(file, durable=False) as part:
            write_video(part, render(one, size)[0], fps)
        split = {8: "validate", 9: "test"}.get(index % 10, "train")
        videos.append(
            {
                "video_id": f"video{index}",
                "id": index,
                "split": split,
                "start time": 0.0,
                "end time": num_frames / fps,
                "category": int(one.motion),
            }
        )
        said = one.still_captions(0) if still else one.captions(0)
        lines.append(
            Video(
                video=f"videos/{file.name}",
                video_id=f"video{index}",
                captions=tuple(said),
                split="val" if split == "validate" else split,
            )
        )
        for caption in said:
            sentences.append(
                {"sen_id": len(sentences), "video_id": f"video{index}", "caption": caption}
            )
        if progress is not None:
            progress(index + 1)
    write_manifest(manifest, lines)
    _write_annotations(path, info, videos, sentences)
    return path


def _is_world(annotations: Path) -> bool:
    """Whether `write_world` wrote the file."""
    try:
        return json.loads(annotations.read_text())["info"]["description"] == DESCRIPTION
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_annotations(
    path: Path,
    info: dict[str, object],
    videos: list[dict[str, object]],
    sentences: list[dict[str, object]],
) -> None:
    replace_text(
        path, json.dumps({"info": info, "videos": videos, "sentences": sentences}, indent=1)
    )
