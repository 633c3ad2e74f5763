"""The videos of an experiment: read from its manifest, without those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Subset

from tokenmix_ops.video.data.cache import FrameCache
from tokenmix_ops.video.data.clips import ClipError
from tokenmix_ops.video.data.dataset import Clips
from tokenmix_ops.video.data.manifest import Manifest, missing, read_manifest, summary
from tokenmix_ops.video.engine.progress import Progress
from tokenmix_ops.video.experiments.settings import Videos

_SHOWN = 3


def open_data(
    videos: Videos, *splits: str, say: Callable[[str], None]
) -> tuple[Manifest, dict[str, int]]:
    """The videos of an experiment, without those of ``splits`` that are not there; and how many
    each split has with them.

    ``say`` is told what is left out. Raises ValueError if no data are named, a split is empty, or
    more of it is missing than ``max_unreadable`` allows.
    """
    if videos.data is None:
        raise ValueError(
            "no data given: pass --data FILE.jsonl, with one video a line (video, video_id, "
            "captions, split); tokenmix data prepare makes one of official annotations, and "
            "tokenmix data shapes FOLDER writes a small one to try"
        )
    try:
        manifest = read_manifest(videos.data, videos.root, strict=videos.strict)
    except OSError as error:
        raise ValueError(f"--data {videos.data} cannot be read: {error.strerror}") from error
    if manifest.problems:
        say(f"{videos.data}: {summary(manifest.problems)}; tokenmix data check lists them")
    counts = {split: len(manifest.of_split(split)) for split in splits}
    for split in splits:
        absent = {
            video.video_id: str(manifest.path_of(video)) for video in missing(manifest, split)
        }
        manifest = _without(manifest, split, counts, absent, "are not there", videos, say)
    return manifest, counts


def open_cache(videos: Videos) -> FrameCache | None:
    """Where decoded frames are kept, if an experiment wants it."""
    if videos.cache is None:
        return None
    return FrameCache(videos.cache, round(videos.cache_gib * 2**30))


def check_captions(manifest: Manifest, split: str, *, each: bool) -> None:
    """Raises ValueError if a split cannot be evaluated: none of its videos, or not ``each``, has
    captions."""
    videos = manifest.of_split(split)
    without = [video.video_id for video in videos if not video.captions]
    if len(without) == len(videos) or (each and without):
        raise ValueError(
            f"{len(without)} of {len(videos)} videos of split {split!r} have no captions to "
            f"compare with: {', '.join(without[:3])}{', ...' if len(without) > 3 else ''}"
        )


def only_readable(
    manifest: Manifest,
    split: str,
    counts: Mapping[str, int],
    videos: Videos,
    workers: int,
    accelerator: Accelerator,
    progress: Progress,
) -> Manifest:
    """The manifest without videos of a split that an evaluation could not read.

    All of them are read for it, once, by all processes together; not if none may be left out.
    ``counts`` is what `open_data` counted. Raises ValueError if they are more than
    ``max_unreadable`` allows.
    """
    if not videos.max_unreadable:
        return manifest
    clips = Clips(
        manifest,
        split,
        num_frames=videos.num_frames,
        size=videos.image_size,
        fps=videos.fps,
        cache=open_cache(videos),
    )
    own = range(accelerator.process_index, len(clips), accelerator.num_processes)
    loader: DataLoader[Any] = DataLoader(
        Subset(_Reasons(clips), own),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),
    )
    found = list(progress.track(loader, f"reading of {split}"))
    reasons = dict(pair for pair in gather_object(found) if pair[1] is not None)
    return _without(manifest, split, counts, reasons, "cannot be read", videos, progress.say)


class _Reasons(Dataset[tuple[str, str | None]]):
    """Why each clip cannot be read, or None, with its ``video_id``."""

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __getitem__(self, row: int) -> tuple[str, str | None]:
        try:
            self.clips[row]
        except ClipError as error:
            return self.clips.videos[row].video_id, str(error)
        return self.clips.videos[row].video_id, None


def _without(
    manifest: Manifest,
    split: str,
    counts: Mapping[str, int],
    reasons: Mapping[str, str],
    what: str,
    videos: Videos,
    say: Callable[[str], None],
) -> Manifest:
    if not reasons:
        return manifest
    present = len(manifest.of_split(split))
    gone = counts[split] - present
    shown = list(reasons.values())
    listed = ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
    found = f"{len(reasons)} of {present} videos of split {split!r} {what}: {listed}"
    if len(reasons) + gone > videos.max_unreadable * counts[split]:
        also = f", and {gone} are not there" if gone else ""
        hint = "; is --root right?" if len(reasons) == present else ""
        raise ValueError(
            f"{found}{also}: more than the share of {videos.max_unreadable:g} that "
            f"--max-unreadable allows; tokenmix data check lists them all{hint}"
        )
    say(f"left out: {found}")
    kept = [v for v in manifest.videos if v.split != split or v.video_id not in reasons]
    return replace(manifest, videos=tuple(kept))
