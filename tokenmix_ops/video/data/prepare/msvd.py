"""MSVD: 1,970 clips with about 40 sentences each, as text or pickle, and three lists of ids."""

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

# A generous bound: in a pickle, a frequent word costs a reference of only two bytes.
_GROWTH = 50


def official(request: Request) -> Mapping[str, int]:
    """Return the sizes of the official splits."""
    return {"train": 1200, "val": 100, "test": 670}


def read(request: Request, listing: Listing) -> None:
    """Read the videos of the available lists; the text file takes precedence over the pickle."""
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
            # Report once per video, and only if no list is missing that could contain it.
            if complete and not listing.is_passed_over(video_id):
                what = f"expected video {video_id!r} in {', '.join(LISTS.values())}, found in none"
                listing.problem("unknown split", where, what)
            listing.pass_over(video_id)
        listing.caption(video_id, caption, where)


def _text(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (place, id, caption) for each line that is not a comment."""
    for where, line in read_lines(path):
        if not line.startswith("#"):
            video_id, *caption = line.split(maxsplit=1)
            yield where, video_name(video_id, where), "".join(caption).strip()


def _pickled(path: Path) -> Iterator[tuple[str, str, str]]:
    data = load_plain(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must hold a dict from id to captions, got {shown(data)}")
    # Limit the total text: a small pickle can refer to one list many times.
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
                    f"{where}: expected at most {_GROWTH} times the file's size in text, got more: "
                    "the pickle repeats references; write its captions out in full"
                )
            yield where, video_id, " ".join(tokens)
