"""Finds a model's files, in a directory or on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError


class ModelNotFound(OSError, ValueError):
    """The model does not exist. An OSError, as in transformers, and a ValueError."""


def model_folder(model: str | os.PathLike[str], files: Sequence[str], advice: str) -> Path:
    """Return the directory that holds a model: ``model`` itself, or a download from the hub.

    Queries the hub once with a timeout of seconds, and falls back to the local cache. ``files``
    are the patterns to download; ``.bin`` files only if there is no ``.safetensors``. Raises
    ModelNotFound, ending in ``advice``, if there is no such model.
    """
    if Path(model).is_dir():
        return Path(model)
    name, wanted, unreached = str(model), list(files), None
    try:
        about = HfApi().model_info(name, timeout=10)
        if any(fnmatch(file.rfilename, "*.safetensors") for file in about.siblings or ()):
            wanted = [pattern for pattern in wanted if ".bin" not in pattern]
    except HFValidationError as error:
        raise ModelNotFound(f"{name} does not exist; {advice}") from error
    except Exception as error:  # no such model, no network, offline mode: the cache may have it
        unreached = error
    try:
        offline = unreached is not None
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=offline))
    except Exception as error:
        cause = unreached or error
        reason = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
        raise ModelNotFound(
            f"{name} is not a directory or file, and fetching it from the Hugging Face hub failed "
            f"({reason}); {advice}"
        ) from cause
