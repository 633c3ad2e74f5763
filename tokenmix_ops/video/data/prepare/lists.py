"""Lists of videos and captions, one file per split, as used by the paper's authors and LAVIS.

Each file is JSON in one of two formats, detected by its content:

- a list of objects with ``caption``, a string or a list of strings, and the video's name or file
  under ``video``, ``image`` (the authors' retrieval lists), or else ``image_id``. A video may
  repeat with another caption. Numeric fields (``video_id``, ...) are ignored;
- COCO's format: ``annotations`` with ``image_id`` and ``caption``, and ``images`` with ``id`` and
  optionally ``file_name``. 6968 and "6968" are the same id. It means video6968 if all videos with
  digits only at the end share the prefix "video"; otherwise it is a name.

A file may have a path, "a/b.mp4". Without suffix it is the video's id, and the search tries it
before any "b".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tokenmix_ops.video.data.prepare.listing import Listed, Listing
from tokenmix_ops.video.data.prepare.reading import Record, read_json, video_path
from tokenmix_ops.video.data.prepare.sources import Request

FILES: tuple[str, ...] = ()
OTHERS = ""

_NUMBER = re.compile("0|[1-9][0-9]{0,17}")


def official(request: Request) -> Mapping[str, int]:
    """Return no counts, because the data set of a list is unknown."""
    return {}


def read(request: Request, listing: Listing) -> None:
    """Read the file of each split."""
    for split, path in request.splits.items():
        data = read_json(path)
        if isinstance(data, dict):
            _coco(Record(data, str(path)), split, listing)
        elif isinstance(data, list):
            _list(data, path, split, listing)
        else:
            raise ValueError(f"{path}: must hold a list or an object, got {data!r:.80}")


def _list(data: list[object], path: Path, split: str, listing: Listing) -> None:
    for i, value in enumerate(data):
        entry = Record(value, f"{path}, [{i}]")
        video_id = video_path(entry.text(_naming(entry)), entry.where)
        several = isinstance(entry.get("caption"), list)
        captions = entry.texts("caption") if several else [entry.text("caption")]
        listed = listing.videos.get(video_id)
        further = listed is not None and listed.split == split and not several
        if further or listing.add(Listed(video_id, split, entry.where)):
            for caption in captions:
                listing.caption(video_id, caption, entry.where)


def _naming(entry: Record) -> str:
    """Return the field with the video's name; a numeric image_id is not a name."""
    names = [name for name in ("video", "image") if name in entry]
    if not names and "image_id" in entry and isinstance(entry.get("image_id"), str):
        names = ["image_id"]
    return names[0] if names else "video"


def _coco(data: Record, split: str, listing: Listing) -> None:
    names: dict[str, str | None] = {}

    def add(record: Record, key: str) -> None:
        """List a video and store its name, or None if it is dropped."""
        has_file = "file_name" in record
        name = record.text("file_name") if has_file else key
        number = int(key) if _NUMBER.fullmatch(key) and not has_file else None
        video = Listed(video_path(name, record.where), split, record.where, number=number)
        names[key] = video.video_id if listing.add(video) else names.get(key)

    for image in data.records("images") if "images" in data else ():
        add(image, _key(image, "id"))
    for annotation in data.records("annotations"):
        key, caption = _key(annotation, "image_id"), annotation.text("caption")
        if key not in names and "images" in data:
            what = f"video {key!r:.80} of this caption is not among the images"
            listing.problem("unknown video", annotation.where, what)
            continue
        if key not in names:
            add(annotation, key)
        if (name := names[key]) is not None:
            listing.caption(name, caption, annotation.where)


def _key(record: Record, name: str) -> str:
    """Return an id as a string; 1 and "1" are the same, as in scoring."""
    value = record.get(name)
    if type(value) is int and 0 <= value < 10**18:
        return str(value)
    return record.text(name)
