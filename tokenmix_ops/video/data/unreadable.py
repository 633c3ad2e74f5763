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
    from before. Of the split, ``videos`` are there and ``missing`` more are not; both count for
    the ``share`` of it that may be. Raises ValueError unless that is from 0 to below 1.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        videos: Iterable[Video],
        share: float,
        missing: int = 0,
    ) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"max_unreadable is {share}, it must be at least 0 and below 1")
        self.path = Path(path)
        self.ids = frozenset(video.video_id for video in videos)
        self.share = share
        self.missing = missing
        self._reasons: dict[str, str] = {}
        self._read = 0

    def __contains__(self, video: Video) -> bool:
        """Whether this process knows that a video cannot be read."""
        return video.video_id in self._reasons

    def add(self, video: Video, error: Exception) -> None:
        """List a video, if it is not there yet.

        Raises ValueError if there are now more than the allowed share; OSError if the list cannot
        be written.
        """
        if video not in self and video.video_id not in self.reasons():
            fields = {"video_id": video.video_id, "video": video.video, "error": str(error)}
            self._append(json.dumps(fields, ensure_ascii=False))
            self.reasons()
        if len(self._reasons) + self.missing > self.share * (len(self.ids) + self.missing):
            also = f" and {self.missing} are not there" if self.missing else ""
            raise ValueError(
                f"{self.remark()}{also}: more than the share of {self.share:g} that "
                f"--max-unreadable allows; the last: {error}"
            )

    def reasons(self) -> dict[str, str]:
        """Why each could not be read, by ``video_id``."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read)
                # What has no end yet may be in the making.
                new = file.read().rpartition(b"\n")[0]
            self._read += len(new) + 1 if new else 0
            for line in new.split(b"\n"):
                record = _parsed(line)
                if record and record["video_id"] in self.ids:
                    self._reasons.setdefault(record["video_id"], record["error"])
        return dict(self._reasons)

    def remark(self) -> str | None:
        """How many there are, in words; None if there are none."""
        count = len(self.reasons())
        if not count:
            return None
        return f"{count} of {len(self.ids)} videos could not be read, {self.path} lists them"

    def _append(self, line: str) -> None:
        """One write to the end of the file: lines of several processes do not mix."""
        data = f"{line}\n".encode("utf-8", "backslashreplace")
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                # A disk that was full cut the last line.
                data = b"\n" + data
            if os.write(descriptor, data) < len(data):
                raise OSError(f"{self.path} could not be written: is the disk full?")
        finally:
            os.close(descriptor)


def _parsed(line: bytes) -> dict[str, str] | None:
    """What a line says; None for one that was cut."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return None
