"""Lists of videos and captions, one file a split: the paper's authors' and LAVIS's.

Each is JSON, and told by what it holds:

- a list of objects with ``caption``, a string or a list of them, and the video's name or file under
  ``video``, or ``image`` as the authors' retrieval has it, or ``image_id`` if neither is there; a
  video may come again with another caption. Numbers beside them (``video_id``, ...) are not needed;
- COCO's form, ``annotations`` with ``image_id`` and ``caption``, and ``images`` with ``id`` and
  perhaps ``file_name``. 6968 and "6968" are one id, and the number of video6968 if all videos whose
  only digits are at the end begin as that one does; else it is a name as any other.

A file may lie in folders, "a/b.mp4": without suffix that is the video's id, and where it is looked
for before any "b".
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
    """Nothing: whose list it is cannot be told."""
    return {}


def read(request: Request, listing: Listing) -> None:
    """The file of each split."""
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
    """The field with the video's name; a number for an image_id is no name."""
    names = [name for name in ("video", "image") if name in entry]
    if not names and "image_id" in entry and isinstance(entry.get("image_id"), str):
        names = ["image_id"]
    return names[0] if names else "video"


def _coco(data: Record, split: str, listing: Listing) -> None:
    names: dict[str, str | None] = {}

    def add(record: Record, key: str) -> None:
        """Lists a video, and notes what it is called, or None if it is left out."""
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
    """An id, 1 and "1" being one, as for scores."""
    value = record.get(name)
    if type(value) is int and 0 <= value < 10**18:
        return str(value)
    return record.text(name)
