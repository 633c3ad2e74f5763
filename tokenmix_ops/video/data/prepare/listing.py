"""What annotation files say of videos, gathered before any video is looked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenmix_ops.video.data.manifest import SPLITS, Problem


@dataclass
class Listed:
    """A video as annotations have it."""

    video_id: str
    """A name, or a path with "/"; without suffix."""
    split: str
    where: str
    """Where it is listed, as "FILE, line 7"."""
    captions: list[str] = field(default_factory=list)
    folder: str = ""
    """The folder, below that of the videos, in which it is to be expected."""
    suffix: str = ".mp4"
    """How its file is to be expected to end."""
    uncut: tuple[str, float, float] | None = None
    """The name of the longer video that it was cut from, and start and end there in seconds."""
    number: int | None = None
    """Where the annotations have but a number, which stands in the video's name as well."""


class Listing:
    """Videos by id, in the order of the files, and what is wrong with them.

    With ``strict`` the first problem is raised as a ValueError.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.videos: dict[str, Listed] = {}
        self.problems: list[Problem] = []
        self._passed_over: set[str] = set()

    def problem(self, kind: str, where: str, what: str) -> None:
        """Notes a problem, or raises it."""
        if self.strict:
            raise ValueError(f"{where}: {what}")
        self.problems.append(Problem(kind, where, what))

    def add(self, video: Listed) -> bool:
        """Lists a video, unless its id is listed and `settle` keeps that; says whether it did."""
        first = self.videos.get(video.video_id)
        if first is not None:
            if self.settle(video.video_id, first, video) is first:
                return False
            del self.videos[video.video_id]
        self.videos[video.video_id] = video
        return True

    def settle(self, video_id: str, first: Listed, second: Listed) -> Listed:
        """Which of two that are one video stays; the other becomes a problem.

        In one split it is the first. Of two splits train loses the video, lest there be less to
        test, or something tested that was trained on; val loses it to test.
        """
        if first.split == second.split:
            what = f"video {video_id!r} is listed already, for {first.split}, in {first.where}"
            self.problem("duplicate", second.where, what)
            return first
        lost, kept = sorted((first, second), key=lambda video: SPLITS.index(video.split))
        what = f"video {video_id!r} of {lost.split} is left to {kept.split}, in {kept.where}"
        self.problem("in two splits", lost.where, what)
        return kept

    def pass_over(self, video_id: str) -> None:
        """Leaves a video out; its captions are then no problem."""
        self._passed_over.add(video_id)

    def caption(self, video_id: str, text: str, where: str) -> None:
        """Gives a listed video a caption; one that is blank, or of an unknown video, is not kept.

        The same words twice are two captions: the official counts hold such.
        """
        video = self.videos.get(video_id)
        if video is None and self.is_passed_over(video_id):
            return
        if video is None:
            self.problem(
                "unknown video", where, f"video {video_id!r} of this caption is not listed"
            )
        elif not text.strip():
            self.problem("empty caption", where, f"a caption of video {video_id!r} is blank")
        else:
            video.captions.append(text)

    def is_passed_over(self, video_id: str) -> bool:
        """Whether `pass_over` was told of it."""
        return video_id in self._passed_over
