"""MSR-VTT: 10,000 clips with 20 sentences each, in the organisers' JSON.

The commonly distributed clips, ``video0.mp4`` and so on, are already cut: "start time" and "end
time" refer to the YouTube video at ``url``. A file named by the clip's id therefore gets no times.
If there is only a file named by the YouTube id, it is the full video, and the times apply.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tokenmix_ops.video.data.prepare.listing import Listed, Listing
from tokenmix_ops.video.data.prepare.reading import Record, read_csv, read_json, video_name
from tokenmix_ops.video.data.prepare.sources import Request

WHOLE = "MSRVTT_data.json"
PARTS = ("train_val_videodatainfo.json", "test_videodatainfo.json")
WORLD = "annotations.json"
TRAINING_LISTS = {"9k": "MSRVTT_train.9k.csv", "7k": "MSRVTT_train.7k.csv"}
TEST_LIST = "MSRVTT_JSFUSION_test.csv"
FILES = (WHOLE, *PARTS, WORLD, *TRAINING_LISTS.values(), TEST_LIST)
OTHERS = ".json"
SPLITS = {"train": "train", "validate": "val", "val": "val", "test": "test"}

_YOUTUBE = re.compile(r"(?:[?&]v=|youtu\.be/)([\w-]+)", re.ASCII)


def official(request: Request) -> Mapping[str, int]:
    """Return the sizes of the official splits."""
    if request.task == "captioning":
        return {"train": 6513, "val": 497, "test": 2990}
    return {"train": {"9k": 9000, "7k": 7010}[request.training_list], "val": 0, "test": 1000}


def read(request: Request, listing: Listing) -> None:
    """Read the JSON's splits for captioning, or the lists for retrieval, with 1k-A as test.

    The test list has its own sentence for each video, and suffices alone for testing.
    """
    if request.task == "captioning":
        data = _annotations(request)
        for one in data:
            _videos(one, listing)
        _sentences(data, listing)
        return
    tested = _tested(request.need(TEST_LIST), listing)
    if set(request.found) == {TEST_LIST} and not request.others:
        return
    data = _annotations(request)
    known = {_video_id(video): _uncut(video) for one in data for video in one.records("videos")}
    for video_id in tested & known.keys():
        listing.videos[video_id].uncut = known[video_id]
    training = request.need(TRAINING_LISTS[request.training_list])
    for where, row in read_csv(training, ["video_id"]):
        video_id = video_name(row["video_id"], where)
        if video_id in known:
            listing.add(Listed(video_id, "train", where, uncut=known[video_id]))
        else:
            what = f"video {video_id!r} is not in {', '.join(one.where for one in data)}"
            listing.problem("unknown video", where, what)
    for video_id in known:
        listing.pass_over(video_id)
    _sentences(data, listing, tested)


def _annotations(request: Request) -> list[Record]:
    # WHOLE contains PARTS, and WORLD's name is generic, so other files take precedence over it.
    for names in ((WHOLE,), PARTS, () if request.others else (WORLD,)):
        paths = [request.found[name] for name in names if name in request.found]
        if paths:
            break
    paths = [*paths, *request.others] or [request.need(WHOLE, *PARTS)]
    return [Record(read_json(path), str(path)) for path in paths]


def _video_id(record: Record) -> str:
    return video_name(record.text("video_id"), record.where)


def _uncut(video: Record) -> tuple[str, float, float] | None:
    if not all(name in video for name in ("url", "start time", "end time")):
        return None
    youtube = _YOUTUBE.search(video.text("url"))
    start, end = video.seconds("start time"), video.seconds("end time")
    return (youtube[1], start, end) if youtube and start < end else None


def _videos(data: Record, listing: Listing) -> None:
    for video in data.records("videos"):
        video_id, split = _video_id(video), video.text("split")
        if split in SPLITS:
            listing.add(Listed(video_id, SPLITS[split], video.where, uncut=_uncut(video)))
        else:
            what = f"video {video_id!r}: expected a split of {', '.join(SPLITS)}, got {split!r:.80}"
            listing.problem("unknown split", video.where, what)
            listing.pass_over(video_id)


def _sentences(
    data: list[Record], listing: Listing, complete: frozenset[str] = frozenset()
) -> None:
    """Add captions to the videos, except those in ``complete``."""
    for one in data:
        for sentence in one.records("sentences"):
            video_id, text = _video_id(sentence), sentence.text("caption")
            if video_id not in complete:
                listing.caption(video_id, text, sentence.where)


def _tested(path: Path, listing: Listing) -> frozenset[str]:
    tested = set()
    for where, row in read_csv(path, ["video_id", "sentence"]):
        video_id = video_name(row["video_id"], where)
        if listing.add(Listed(video_id, "test", where)):
            tested.add(video_id)
            listing.caption(video_id, row["sentence"], where)
    return frozenset(tested)
