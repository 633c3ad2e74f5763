"""The curve of a training: one line of JSON an update, and one an evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenmix_ops.video.files import replace_text, writing


class Log:
    """Appends to a file; ``None`` as its path writes nothing, on the other processes.

    Opened after ``update`` updates, it drops what an interrupted process wrote beyond them, so
    that the file stays one curve. OSError names the file.
    """

    def __init__(self, path: Path | None, update: int) -> None:
        self.path = path
        if path is None:
            return
        if path.exists():
            replace_text(path, "".join(_lines_until(path, update)))
        with writing(path):
            self.file = path.open("a", encoding="utf-8")

    def add(self, kind: str, line: Mapping[str, Any]) -> None:
        """Adds a line of a kind, "update" or "evaluation"."""
        if self.path is not None:
            with writing(self.path):
                self.file.write(json.dumps({"kind": kind, **line}) + "\n")
                self.file.flush()

    def sync(self) -> None:
        """Has every line on the disk: before a state that follows them."""
        if self.path is not None:
            with writing(self.path):
                os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self.path is not None:
            self.file.close()


def _lines_until(path: Path, update: int) -> list[str]:
    """Lines up to an update. An evaluation follows the state of its update: it is done again."""
    kept = []
    for text in path.read_text("utf-8").splitlines(keepends=True):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            # The process was killed in the middle of this line, so nothing comes after it.
            break
        if line["update"] < update + (line["kind"] == "update"):
            kept.append(text)
    return kept
