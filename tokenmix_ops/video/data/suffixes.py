"""What the entries of a folder are, by their names: videos, images, or folders."""

from __future__ import annotations

import os
from pathlib import PurePath

VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")


def is_video_name(name: str) -> bool:
    """Whether a file's name ends as a video's does."""
    return PurePath(name).suffix.lower() in VIDEO_SUFFIXES


def is_image_name(name: str) -> bool:
    """Whether a file's name ends as that of an image of which a folder of images can be made."""
    return PurePath(name).suffix.lower() in IMAGE_SUFFIXES


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        # A link that leads round and round, or through a file.
        return False
