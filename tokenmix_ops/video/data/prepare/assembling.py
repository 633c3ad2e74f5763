"""Brings together what annotations say of videos and where these were found."""

from __future__ import annotations

from tokenmix_ops.video.data.manifest import Video
from tokenmix_ops.video.data.prepare.listing import Listed, Listing
from tokenmix_ops.video.data.prepare.locating import Library


def assemble(listing: Listing, library: Library, prefix: str) -> tuple[list[Video], set[str]]:
    """The videos, whose paths start with ``prefix``, and the ids of those that are not there.

    Left out are videos for training without captions, and those that turn out to be one that is
    listed already. A video that is not there has the path where it is to be expected.
    """
    videos: dict[str, Video] = {}
    absent: set[str] = set()
    for listed in listing.videos.values():
        video_id = _name(listed, library)
        if video_id in videos:
            what = f"video {video_id!r} is listed already, for {videos[video_id].split}"
            listing.problem("duplicate", listed.where, what)
            continue
        if not listed.captions:
            what = f"video {video_id!r}, for {listed.split}, has no captions"
            listing.problem("no captions", listed.where, what)
            if listed.split == "train":
                continue
        path, start, end = library.find(video_id), None, None
        name = video_id
        if path is None and listed.uncut is not None:
            name, start, end = listed.uncut
            path = library.find(name)
            if path in library.folders:
                # Images have no clock.
                path = None
        if path is None:
            absent.add(video_id)
            start, end = None, None
            path = "/".join(filter(None, (listed.folder, video_id + listed.suffix)))
            what = f"video {video_id!r} is not in the videos' folder, for one as {path}"
            listing.problem("missing video", listed.where, what + _near(listed, library))
        elif len(library.files[name]) > 1:
            paths = library.files[name]
            what = f"video {video_id!r} is there as {', '.join(paths)}; the first is taken"
            listing.problem("ambiguous video", listed.where, what)
        path = path if prefix == "." else f"{prefix}/{path}"
        videos[video_id] = Video(path, video_id, tuple(listed.captions), listed.split, start, end)
    return list(videos.values()), absent


def _name(listed: Listed, library: Library) -> str:
    """The id of a video, or the name of the only one that has its number."""
    if listed.number is None or library.find(listed.video_id) is not None:
        return listed.video_id
    names = library.numbered(listed.number)
    return names[0] if len(names) == 1 else listed.video_id


def _near(listed: Listed, library: Library) -> str:
    """What there is instead, after a semicolon."""
    if listed.number is not None and (names := library.numbered(listed.number)):
        return f"; several have its number: {', '.join(sorted(names)[:3])}"
    if listed.uncut is not None and library.find(listed.uncut[0]) is not None:
        return f"; {listed.uncut[0]} is a folder of images, without a clock to find the span by"
    return ""
