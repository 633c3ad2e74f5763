"""Videos that a training could not read: skipped, listed in a file, and no more than allowed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from tokenmix_ops.video.data.manifest import Video


class Unreadable:
    """A list of videos, JSON lines, that several processes and their workers add to.

    The file is the list, so that workers see each other's finds, and a training that goes on those
    from before. Raises ValueError unless ``share`` is from 0 to below 1.
    """

    def __init__(self, path: str | os.PathLike[str], videos: Iterable[Video], share: float) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"max_unreadable is {share}, it must be at least 0 and below 1")
        self.path = Path(path)
        self.ids = frozenset(video.video_id for video in videos)
        self.share = share
        self.found: set[str] = set()

    def add(self, video: Video, error: Exception) -> None:
        """List a video, if it is not there yet.

        Raises ValueError if there are now more than the allowed share; OSError if the list cannot
        be written.
        """
        if video.video_id in self.found:
            return
        self.found |= self.reasons().keys()
        if video.video_id not in self.found:
            fields = {"video_id": video.video_id, "video": video.video, "error": str(error)}
            line = (json.dumps(fields, ensure_ascii=False) + "\n").encode()
            # One write to the end of a file: lines of several processes do not mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if os.write(descriptor, line) < len(line):
                    raise OSError(f"{self.path} could not be written: is the disk full?")
            finally:
                os.close(descriptor)
            self.found = set(self.reasons())
        if len(self.found) > self.share * len(self.ids):
            raise ValueError(
                f"{self.remark()}, more than the {self.share:.0%} that --max-unreadable allows; "
                f"the last: {error}"
            )

    def reasons(self) -> dict[str, str]:
        """Why each could not be read, by ``video_id``."""
        if not self.path.exists():
            return {}
        lines = self.path.read_bytes().splitlines(keepends=True)
        # A disk that ran full may have cut the last line.
        records = (json.loads(line) for line in lines if line.endswith(b"\n"))
        known = {str(record["video_id"]): str(record["error"]) for record in records}
        return {name: error for name, error in known.items() if name in self.ids}

    def remark(self) -> str | None:
        """How many there are, in words; None if there are none."""
        count = len(self.reasons())
        if not count:
            return None
        return f"{count} of {len(self.ids)} videos could not be read, {self.path} lists them"
