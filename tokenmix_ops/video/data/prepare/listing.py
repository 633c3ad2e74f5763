"""Collects videos and captions from annotation files, before any video is searched."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenmix_ops.video.data.manifest import SPLITS, Problem


@dataclass
class Listed:
    """A video listed in annotations."""

    video_id: str
    """A name, or a path with "/", without suffix."""
    split: str
    where: str
    """The place of the entry, such as "FILE, line 7"."""
    captions: list[str] = field(default_factory=list)
    folder: str = ""
    """Its expected subfolder of the videos' folder."""
    suffix: str = ".mp4"
    """Its expected suffix."""
    uncut: tuple[str, float, float] | None = None
    """The name of the video it was cut from, and its start and end there in seconds."""
    number: int | None = None
    """The number in the video's name, if the annotations give only that."""


class Listing:
    """Videos by id, in the order of the files, and their problems.

    With ``strict``, the first problem raises ValueError.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.videos: dict[str, Listed] = {}
        self.problems: list[Problem] = []
        self._passed_over: set[str] = set()

    def problem(self, kind: str, where: str, what: str) -> None:
        """Record a problem, or raise it."""
        if self.strict:
            raise ValueError(f"{where}: {what}")
        self.problems.append(Problem(kind, where, what))

    def add(self, video: Listed) -> bool:
        """Add a video unless `settle` keeps an earlier one; return whether it was added."""
        first = self.videos.get(video.video_id)
        if first is not None:
            if self.settle(video.video_id, first, video) is first:
                return False
            del self.videos[video.video_id]
        self.videos[video.video_id] = video
        return True

    def settle(self, video_id: str, first: Listed, second: Listed) -> Listed:
        """Choose between two entries for one video; the other becomes a problem.

        Within a split the first wins. Otherwise test wins over val, and val over train, which keeps
        the test complete and its videos out of training.
        """
        if first.split == second.split:
            what = f"video {video_id!r} is already listed for {first.split} in {first.where}"
            self.problem("duplicate", second.where, what)
            return first
        lost, kept = sorted((first, second), key=lambda video: SPLITS.index(video.split))
        what = f"video {video_id!r} in {lost.split} is kept only for {kept.split}, in {kept.where}"
        self.problem("in two splits", lost.where, what)
        return kept

    def pass_over(self, video_id: str) -> None:
        """Ignore a video and its captions without reporting problems."""
        self._passed_over.add(video_id)

    def caption(self, video_id: str, text: str, where: str) -> None:
        """Add a caption to a listed video; report blank captions and unknown videos.

        Keeps repeated captions, as the official counts do.
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
        """Whether `pass_over` was called for a video."""
        return video_id in self._passed_over
