"""VATEX: ten-second spans of YouTube videos with ten English sentences each, in JSON.

An id such as ``G9zN5TTuGO4_000179_000189`` is the YouTube id, then start and end in seconds. A file
named by the full id holds only the span; one named by the YouTube id is the full video.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tokenmix_ops.video.data.prepare.listing import Listed, Listing
from tokenmix_ops.video.data.prepare.reading import read_records, video_name
from tokenmix_ops.video.data.prepare.sources import Request

SPLITS = {
    "vatex_training_v1.0.json": "train",
    "vatex_validation_v1.0.json": "val",
    "vatex_public_test_english_v1.1.json": "test",
}
FILES = tuple(SPLITS)
OTHERS = ""

# YouTube ids may themselves contain dashes and underscores.
_SPAN = re.compile(r"(.+)_([0-9]+)_([0-9]+)", re.ASCII)


def official(request: Request) -> Mapping[str, int]:
    """Return the sizes of the official splits."""
    return {"train": 25991, "val": 3000, "test": 6000}


def read(request: Request, listing: Listing) -> None:
    """Read the available splits."""
    for name, split in SPLITS.items():
        if name not in request.found:
            continue
        for entry in read_records(request.found[name]):
            video_id = video_name(entry.text("videoID"), entry.where)
            if "enCap" not in entry:
                raise ValueError(
                    f"{entry.where}: {video_id!r:.80} lacks 'enCap'; the private test has no "
                    "captions, use the public one, vatex_public_test_english_v1.1.json"
                )
            captions = entry.texts("enCap")
            if listing.add(Listed(video_id, split, entry.where, uncut=_span(video_id))):
                for caption in captions:
                    listing.caption(video_id, caption, entry.where)


def _span(video_id: str) -> tuple[str, float, float] | None:
    parts = _SPAN.fullmatch(video_id)
    if parts is None:
        return None
    start, end = float(parts[2]), float(parts[3])
    return (parts[1], start, end) if start < end < float("inf") else None
