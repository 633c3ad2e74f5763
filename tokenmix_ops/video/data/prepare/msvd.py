"""MSVD: 1,970 clips with some 40 sentences each, as text or pickled, and three lists of ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as shown

from tokenmix_ops.video.data.manifest import is_text
from tokenmix_ops.video.data.prepare.listing import Listed, Listing
from tokenmix_ops.video.data.prepare.plain_pickle import load_plain
from tokenmix_ops.video.data.prepare.reading import read_lines, video_name
from tokenmix_ops.video.data.prepare.sources import Request

TEXT = "AllVideoDescriptions.txt"
PICKLE = "raw-captions.pkl"
LISTS = {"train": "train_list.txt", "val": "val_list.txt", "test": "test_list.txt"}
FILES = (TEXT, PICKLE, *LISTS.values())
OTHERS = ""

# Many times what words that are used often take, each a reference of two bytes.
_GROWTH = 50


def official(request: Request) -> Mapping[str, int]:
    """How many videos the official splits hold."""
    return {"train": 1200, "val": 100, "test": 670}


def read(request: Request, listing: Listing) -> None:
    """The videos of the lists that are there; the text is taken where there is the pickle too."""
    path = request.need(TEXT, PICKLE)
    if not any(name in request.found for name in LISTS.values()):
        request.need(*LISTS.values())
    for split, name in LISTS.items():
        if name in request.found:
            for where, line in read_lines(request.found[name]):
                listing.add(Listed(video_name(line, where), split, where, suffix=".avi"))
    complete = all(name in request.found for name in LISTS.values())
    for where, video_id, caption in _text(path) if path.name == TEXT else _pickled(path):
        if video_id not in listing.videos:
            # Once for all its captions, and only where no list is missing that it could be in.
            if complete and not listing.is_passed_over(video_id):
                what = f"video {video_id!r} is in none of {', '.join(LISTS.values())}"
                listing.problem("unknown split", where, what)
            listing.pass_over(video_id)
        listing.caption(video_id, caption, where)


def _text(path: Path) -> Iterator[tuple[str, str, str]]:
    """(place, id, caption) of each line that is no comment."""
    for where, line in read_lines(path):
        if not line.startswith("#"):
            video_id, *caption = line.split(maxsplit=1)
            yield where, video_name(video_id, where), "".join(caption).strip()


def _pickled(path: Path) -> Iterator[tuple[str, str, str]]:
    data = load_plain(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must hold a dict of id to captions, got {shown(data)}")
    # One list may stand in many places of a small file.
    room = _GROWTH * path.stat().st_size
    for key, captions in data.items():
        if not is_text(key):
            raise ValueError(f"{path}: ids must be strings, got {shown(key)}")
        video_id = video_name(key, str(path))
        if not isinstance(captions, list | tuple):
            raise ValueError(f"{path}, {key!r:.80}: must be a list, got {shown(captions)}")
        for i, tokens in enumerate(captions):
            where = f"{path}, {key!r:.80}[{i}]"
            if not (isinstance(tokens, list | tuple) and all(map(is_text, tokens))):
                raise ValueError(f"{where}: must be a list of strings, got {shown(tokens)}")
            room -= 1 + len(tokens) + sum(map(len, tokens))
            if room < 0:
                raise ValueError(
                    f"{where}: by here its text is {_GROWTH} times as long as the file, which "
                    "repeats what it refers to; captions that are written out are not"
                )
            yield where, video_id, " ".join(tokens)
