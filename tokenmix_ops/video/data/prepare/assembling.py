"""Matches listed videos with the files that were found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tokenmix_ops.video.data.manifest import Video
from tokenmix_ops.video.data.prepare.listing import Listed, Listing
from tokenmix_ops.video.data.prepare.locating import Library


def assemble(listing: Listing, library: Library, prefix: str) -> tuple[list[Video], set[str]]:
    """Return the videos, with paths under ``prefix``, and the ids of missing ones.

    Drops training videos without captions, and one of two entries that turn out to be the same
    video. A missing video gets its expected path.
    """
    bases = Counter(map(_base, listing.videos))
    # Key by path if found, because two ids may lead to one file, else by id.
    chosen: dict[tuple[str | None, str], tuple[str, str, Listed]] = {}
    for listed in listing.videos.values():
        video_id, name = _names(listed, library, bases)
        path = library.find(name)
        key = (path, "") if path is not None else (None, video_id)
        if key in chosen:
            other = chosen[key][2]
            if listing.settle(video_id, other, listed) is other:
                continue
            del chosen[key]
        chosen[key] = video_id, name, listed
    videos: list[Video] = []
    absent: set[str] = set()
    for video_id, name, listed in chosen.values():
        if not listed.captions:
            what = f"video {video_id!r}, for {listed.split}, has no captions"
            listing.problem("no captions", listed.where, what)
            if listed.split == "train":
                continue
        path, start, end = library.find(name), None, None
        if path is None and listed.uncut is not None:
            name, start, end = listed.uncut
            path = library.find(name)
            if path in library.folders:
                # Images have no timestamps.
                path = None
        if path is None:
            absent.add(video_id)
            start, end = None, None
            path = "/".join(filter(None, (listed.folder, video_id + listed.suffix)))
            what = f"video {video_id!r} is not in the videos' folder, expected at {path}"
            listing.problem("missing video", listed.where, what + _near(listed, library))
        elif len(paths := library.paths(name)) > 1:
            what = f"video {video_id!r} exists as {', '.join(paths)}; using the first"
            listing.problem("ambiguous video", listed.where, what)
        path = path if prefix == "." else f"{prefix}/{path}"
        videos.append(Video(path, video_id, tuple(listed.captions), listed.split, start, end))
    return videos, absent


def _names(listed: Listed, library: Library, bases: Mapping[str, int]) -> tuple[str, str]:
    """Return the id of a video, and the name or path to look for.

    A number becomes the name of the only video with that number. A path that does not exist is
    searched by its last part, unless other videos are listed under that name.
    """
    video_id = listed.video_id
    if library.find(video_id) is not None:
        return video_id, video_id
    if listed.number is not None and len(names := library.numbered(listed.number)) == 1:
        return names[0], names[0]
    base = _base(video_id)
    return video_id, base if bases[base] == 1 else video_id


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _near(listed: Listed, library: Library) -> str:
    """Describe near misses, after a semicolon."""
    if listed.number is not None:
        if names := library.numbered(listed.number):
            return f"; several videos have its number: {', '.join(sorted(names)[:3])}"
        if len(library.beginnings) > 1:
            some = ", ".join(map(repr, library.beginnings[:3]))
            return f"; its number is ambiguous, because names there start with {some}"
    if "/" in listed.video_id and (path := library.find(_base(listed.video_id))) is not None:
        return f"; {path} has its name, but other listed videos have that name too"
    if listed.uncut is not None and library.find(listed.uncut[0]) is not None:
        return f"; {listed.uncut[0]} is a folder of images, without timestamps to find the span"
    return ""
