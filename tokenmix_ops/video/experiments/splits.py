"""The splits of an experiment: their videos, without those that are missing or unreadable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Subset

from tokenmix_ops.video.data.cache import FrameCache
from tokenmix_ops.video.data.clips import ClipError
from tokenmix_ops.video.data.dataset import CaptionedClips, Clips, collate
from tokenmix_ops.video.data.manifest import Manifest, missing, read_manifest, summary
from tokenmix_ops.video.data.unreadable import Unreadable
from tokenmix_ops.video.engine.progress import Progress
from tokenmix_ops.video.experiments.settings import Videos

_SHOWN = 3


class Splits:
    """The splits ``names`` of an experiment's data; missing videos are dropped at once.

    Attributes:
        manifest: the videos that are left.
        counts: the videos of each split, those that were dropped included.
        cache: where decoded frames are kept, or None.

    ``say`` prints what is dropped. Raises ValueError if no data are named, a split is empty, or
    more of it is missing than ``max_unreadable`` allows.
    """

    def __init__(self, videos: Videos, *names: str, say: Callable[[str], None]) -> None:
        self.videos = videos
        self.manifest = _read(videos, say)
        self.counts = {split: len(self.manifest.of_split(split)) for split in names}
        for split in names:
            paths = {
                video.video_id: str(self.manifest.path_of(video))
                for video in missing(self.manifest, split)
            }
            self._drop(split, paths, "are not there", say)
        self.cache: FrameCache | None = None
        if videos.cache is not None:
            self.cache = FrameCache(videos.cache, round(videos.cache_gib * 2**30))

    def check_captions(self, split: str, *, each: bool) -> None:
        """Raises ValueError if no video of a split has captions to compare with, or not ``each``
        has."""
        videos = self.manifest.of_split(split)
        without = [video.video_id for video in videos if not video.captions]
        if len(without) == len(videos) or (each and without):
            raise ValueError(
                f"{len(without)} of {len(videos)} videos of split {split!r} have no captions to "
                f"compare with: {', '.join(without[:3])}{', ...' if len(without) > 3 else ''}"
            )

    def describe_cache(self) -> str | None:
        """How full the cache is, in words; None without one."""
        if self.cache is None:
            return None
        taken = f"{self.cache.taken() / 2**30:.1f} of {self.videos.cache_gib:g} GiB"
        hint = "" if self.videos.fps else "; with --fps 4 it would need far less"
        return f"{self.cache.folder} keeps decoded frames, {taken} so far{hint}"

    def training_clips(self, unreadable: Path, seed: int) -> CaptionedClips:
        """The clips of split "train"; ``unreadable`` is the file that lists unreadable videos."""
        present = self.manifest.of_split("train")
        return CaptionedClips(
            self.manifest,
            "train",
            **self._reading(),
            seed=seed,
            unreadable=Unreadable(
                unreadable,
                present,
                self.videos.max_unreadable,
                missing=self.counts["train"] - len(present),
            ),
        )

    def evaluation_clips(
        self, split: str, batch_size: int, workers: int, accelerator: Accelerator
    ) -> tuple[Clips, DataLoader[dict[str, Any]]]:
        """Returns all clips of a split, and batches of this process's share."""
        clips = Clips(self.manifest, split, **self._reading())
        loader: DataLoader[dict[str, Any]] = DataLoader(
            Subset(clips, _share(clips, accelerator)),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=collate,
            # A generator of its own: PyTorch's is the model's.
            generator=torch.Generator(),
        )
        return clips, loader

    def drop_unreadable(
        self, split: str, workers: int, accelerator: Accelerator, progress: Progress
    ) -> None:
        """Drops the videos of a split that an evaluation could not read.

        The processes share the reading of every video; none is read if none may be dropped. Raises
        ValueError if more are unreadable than ``max_unreadable`` allows.
        """
        if not self.videos.max_unreadable:
            return
        clips = Clips(self.manifest, split, **self._reading())
        loader: DataLoader[Any] = DataLoader(
            Subset(_Reasons(clips), _share(clips, accelerator)),
            batch_size=None,
            num_workers=workers,
            generator=torch.Generator(),
        )
        found = list(progress.track(loader, f"reading of {split}"))
        reasons = dict(pair for pair in gather_object(found) if pair[1] is not None)
        self._drop(split, reasons, "cannot be read", progress.say)

    def _reading(self) -> dict[str, Any]:
        return {
            "num_frames": self.videos.num_frames,
            "size": self.videos.image_size,
            "fps": self.videos.fps,
            "cache": self.cache,
        }

    def _drop(
        self, split: str, reasons: Mapping[str, str], what: str, say: Callable[[str], None]
    ) -> None:
        """Drops the videos of a split that have reasons, by ``video_id``."""
        if not reasons:
            return
        present = len(self.manifest.of_split(split))
        gone = self.counts[split] - present
        shown = list(reasons.values())
        listed = ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
        found = f"{len(reasons)} of {present} videos of split {split!r} {what}: {listed}"
        if len(reasons) + gone > self.videos.max_unreadable * self.counts[split]:
            also = f", and {gone} are not there" if gone else ""
            hint = "; is --root right?" if len(reasons) == present else ""
            raise ValueError(
                f"{found}{also}: more than the share of {self.videos.max_unreadable:g} that "
                f"--max-unreadable allows; tokenmix data check lists them all{hint}"
            )
        say(f"left out: {found}")
        kept = [v for v in self.manifest.videos if v.split != split or v.video_id not in reasons]
        self.manifest = replace(self.manifest, videos=tuple(kept))


def _read(videos: Videos, say: Callable[[str], None]) -> Manifest:
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
    return manifest


def _share(clips: Clips, accelerator: Accelerator) -> range:
    """The rows that this process reads."""
    return range(accelerator.process_index, len(clips), accelerator.num_processes)


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
