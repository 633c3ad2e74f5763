"""LSMDC: film clips with one sentence each, in tab-separated files without a header.

The columns are the clip's id, aligned start and end, extracted start and end, and the sentence, in
which quotes are literal. Clips are already cut, so the manifest has no times; each clip lies in a
folder named after its film. A repeated id with another sentence adds a caption to the clip; with
the same sentence it is a duplicate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tokenmix_ops.video.data.prepare.listing import Listed, Listing
from tokenmix_ops.video.data.prepare.reading import read_lines, video_name
from tokenmix_ops.video.data.prepare.sources import Request

CHALLENGE = "LSMDC16_challenge_1000_publictect.csv"
SPLITS = {
    "LSMDC16_annos_training.csv": "train",
    "LSMDC16_annos_val.csv": "val",
    "LSMDC16_annos_test.csv": "test",
    CHALLENGE: "test",
}
FILES = tuple(SPLITS)
OTHERS = ""

_TIMES = re.compile(r"_[0-9][0-9.]*-[0-9][0-9.]*$")


def official(request: Request) -> Mapping[str, int]:
    """Return the sizes of the official splits; the test split is the challenge's."""
    return {"train": 101079, "val": 7408, "test": 1000}


def read(request: Request, listing: Listing) -> None:
    """Read the available splits; the challenge's test file takes precedence."""
    for name, split in SPLITS.items():
        if name not in request.found:
            continue
        if name == "LSMDC16_annos_test.csv" and CHALLENGE in request.found:
            continue
        fits = False
        for where, line in read_lines(request.found[name]):
            columns = line.split("\t", 5)
            if len(columns) < 6 and not fits:
                raise ValueError(
                    f"{where}: expected 6 tab-separated columns, the last a sentence, "
                    f"got {len(columns)}: {line!r:.80}"
                )
            if len(columns) < 6:
                what = f"expected 6 columns, got {len(columns)}: {line!r:.80}"
                listing.problem("short line", where, what)
                continue
            fits = True
            _add(listing, split, where, video_name(columns[0], where), columns[5].strip())


def _add(listing: Listing, split: str, where: str, clip_id: str, sentence: str) -> None:
    film = _TIMES.sub("", clip_id)
    listed = listing.videos.get(clip_id)
    if listed is None or listed.split != split:
        folder = film if film != clip_id else ""
        if not listing.add(Listed(clip_id, split, where, folder=folder, suffix=".avi")):
            return
    elif sentence in listed.captions:
        what = f"clip {clip_id!r} is already listed for {listed.split} in {listed.where}"
        listing.problem("duplicate", where, what)
        return
    listing.caption(clip_id, sentence, where)
