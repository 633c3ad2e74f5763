"""Summarises a check of a manifest's videos."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from tokenmix_ops.video.data.checking import Checked
from tokenmix_ops.video.data.manifest import SPLITS, Manifest


def report(
    manifest: Manifest, checked: Sequence[Checked], *, num_frames: int, workers: int
) -> dict[str, Any]:
    """Return figures by split, problems, and the reading time of an epoch, ready for JSON.

    Times are in seconds. Ranges have "min", "median", "max" and, for durations, "total" over the
    readable videos; None if the files state no value.
    """
    splits = {
        split: _figures([one for one in checked if one.video.split == split], num_frames)
        for split in SPLITS
        if any(one.video.split == split for one in checked)
    }
    return {
        "root": str(manifest.root),
        "num_frames": num_frames,
        "splits": splits,
        "problems": [asdict(problem) for problem in manifest.problems],
        "unusable": [_line(one) for one in checked if one.status != "ok"],
        "short": [_line(one) for one in checked if _is_short(one, num_frames)],
        "epoch": _epoch(checked, workers),
    }


def _figures(checked: Sequence[Checked], num_frames: int) -> dict[str, Any]:
    readable = [one for one in checked if one.status == "ok"]
    durations = [one.duration for one in readable if one.duration is not None]
    return {
        "videos": len(checked),
        "captions": sum(len(one.video.captions) for one in checked),
        "ok": len(readable),
        "missing": sum(one.status == "missing" for one in checked),
        "unreadable": sum(one.status == "unreadable" for one in checked),
        "short": sum(_is_short(one, num_frames) for one in checked),
        "duration": {"total": sum(durations), **_range(durations)} if durations else None,
        **{
            name: _range(getattr(one, name) for one in readable) or None
            for name in ("num_frames", "fps", "width", "height")
        },
    }


def _range(values: Iterable[float | None]) -> dict[str, float]:
    known = [value for value in values if value is not None]
    if not known:
        return {}
    return {"min": min(known), "median": median(known), "max": max(known)}


def _is_short(one: Checked, num_frames: int) -> bool:
    return one.num_frames is not None and one.num_frames < num_frames


def _line(one: Checked) -> dict[str, Any]:
    return {
        "video_id": one.video.video_id,
        "split": one.video.split,
        "path": str(one.path),
        "status": one.status,
        "error": one.error,
        "num_frames": one.num_frames,
    }


def _epoch(checked: Iterable[Checked], workers: int) -> dict[str, Any] | None:
    """Estimate the pure reading time of an epoch: one clip per training caption."""
    training = [one for one in checked if one.video.split == "train"]
    times = [one.seconds for one in training if one.status == "ok"]
    if not times:
        return None
    captions = sum(len(one.video.captions) for one in training)
    return {
        "captions": captions,
        "workers": workers,
        "seconds_per_clip": fmean(times),
        "seconds": fmean(times) * captions / workers,
    }
