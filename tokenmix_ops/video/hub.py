"""Finds a model's files: a directory, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError


class ModelNotFound(OSError, ValueError):
    """There is no such model: an OSError, as transformers raises, and a wrong argument."""


def model_folder(model: str | os.PathLike[str], files: Sequence[str], advice: str) -> Path:
    """The directory that holds a model: ``model`` itself, or what the hub gives under that name.

    The hub is asked once, and answers or is given up on within seconds; what was fetched before
    serves without it. ``files`` are patterns of what to fetch, ``.bin`` files only where there
    is no ``.safetensors``. Raises ModelNotFound, ending in ``advice``, if there is no such model.
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
            f"{name} is no directory or file, and the Hugging Face hub does not give it, "
            f"{reason}; {advice}"
        ) from cause
