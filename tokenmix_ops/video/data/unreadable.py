"""Lists videos that training could not read and skipped, and enforces their maximum share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from tokenmix_ops.video.data.manifest import Video


class Unreadable:
    """A list of unreadable videos, as JSON lines, shared by all processes and their workers.

    The list lives in the file, so that workers see each other's entries and a resumed run the
    earlier ones. The split has ``videos`` on disk and ``missing`` ones that are not; ``share`` is
    the maximum unreadable fraction of both, where missing ones count as unreadable. Raises
    ValueError unless 0 <= ``share`` < 1.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        videos: Iterable[Video],
        share: float,
        missing: int = 0,
    ) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"max_unreadable must be at least 0 and below 1, got {share}")
        self.path = Path(path)
        self.ids = frozenset(video.video_id for video in videos)
        self.share = share
        self.missing = missing
        self._reasons: dict[str, str] = {}
        self._read = 0

    def __contains__(self, video: Video) -> bool:
        """Whether this process knows that a video is unreadable."""
        return video.video_id in self._reasons

    def add(self, video: Video, error: Exception) -> None:
        """Add a video to the list unless present.

        Raises ValueError if the list exceeds the allowed share, OSError if it cannot be written.
        """
        if video not in self and video.video_id not in self.reasons():
            fields = {"video_id": video.video_id, "video": video.video, "error": str(error)}
            self._append(json.dumps(fields, ensure_ascii=False))
            self.reasons()
        if len(self._reasons) + self.missing > self.share * (len(self.ids) + self.missing):
            also = f" and {self.missing} are missing" if self.missing else ""
            raise ValueError(
                f"{self.remark()}{also}: more than the share of {self.share:g} that "
                f"--max-unreadable allows; last error: {error}"
            )

    def reasons(self) -> dict[str, str]:
        """Return the error for each unreadable video, by ``video_id``."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read)
                # Another process may still be writing a line without an end.
                new = file.read().rpartition(b"\n")[0]
            self._read += len(new) + 1 if new else 0
            for line in new.split(b"\n"):
                record = _parsed(line)
                if record and record["video_id"] in self.ids:
                    self._reasons.setdefault(record["video_id"], record["error"])
        return dict(self._reasons)

    def remark(self) -> str | None:
        """Describe how many videos are unreadable; None if there are none."""
        count = len(self.reasons())
        if not count:
            return None
        return f"{count} of {len(self.ids)} videos could not be read (listed in {self.path})"

    def _append(self, line: str) -> None:
        """Append in a single write, so that lines of several processes do not mix."""
        data = f"{line}\n".encode("utf-8", "backslashreplace")
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                # The last line was cut, for example by a full disk.
                data = b"\n" + data
            if os.write(descriptor, data) < len(data):
                raise OSError(f"{self.path} could not be written: is the disk full?")
        finally:
            os.close(descriptor)


def _parsed(line: bytes) -> dict[str, str] | None:
    """Parse a line; return None if it was cut."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return None
