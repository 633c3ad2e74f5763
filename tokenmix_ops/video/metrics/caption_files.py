"""Reads captions and references from COCO-style JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_predictions(path: Path) -> dict[str, str]:
    """Read captions by id from ``[{"image_id": .., "caption": ".."}, ...]``.

    Ids are strings or integers; 1 and "1" are the same. Raises ValueError naming file and entry for
    any other format, or for two captions with the same id.
    """
    entries = _parsed(path)
    if not isinstance(entries, list):
        raise ValueError(
            f"{path} must hold a list of predictions, "
            f'[{{"image_id": 1, "caption": "a dog runs"}}, ...], got {_kind(entries)}'
        )
    predictions: dict[str, str] = {}
    for where, name, caption in _captions(path, entries):
        if name in predictions:
            raise ValueError(f"{where}: expected one caption per image_id, got two for {name!r}")
        predictions[name] = caption
    return predictions


def read_references(path: Path) -> dict[str, list[str]]:
    """Read caption lists by id from ``{"annotations": [{"image_id": .., "caption": ".."}, ...]}``.

    Keeps the order of "images", ``[{"id": ..}, ...]``, if present, as the COCO evaluation does,
    else that of the captions. An image without captions gets an empty list. Raises ValueError as
    `read_predictions` does.
    """
    document = _parsed(path)
    entries = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError(
            f"{path} must hold a list of annotations, "
            '{"annotations": [{"image_id": 1, "caption": "a dog runs"}, ...]}, '
            f"got {_kind(document)} without one"
        )
    references: dict[str, list[str]] = {}
    images = document.get("images", [])
    if not isinstance(images, list):
        raise ValueError(f"{path}: images must be a list, got {_kind(images)}")
    for number, image in enumerate(images, start=1):
        where = f"{path}: entry {number} of images"
        references[_id(where, _fields(where, image), "id")] = []
    for _, name, caption in _captions(path, entries):
        references.setdefault(name, []).append(caption)
    return references


def write_predictions(path: Path, predictions: Mapping[str, str]) -> None:
    """Write predictions in the format of `read_predictions`."""
    rows = [{"image_id": name, "caption": caption} for name, caption in predictions.items()]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def paired(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    only_predicted: bool = False,
) -> tuple[dict[str, str], dict[str, Sequence[str]]]:
    """Return both for the same ids, in the order of the references.

    With ``only_predicted``, drops references without a prediction. An empty list of references
    counts as none. Raises ValueError naming the ids that either side lacks.
    """
    references = {name: captions for name, captions in references.items() if captions}
    if lacking := [name for name in predictions if name not in references]:
        known = next((f"; references have ids such as {name!r}" for name in references), "")
        raise ValueError(f"references lack {_named(lacking, predictions)} in predictions{known}")
    lacking = [name for name in references if name not in predictions]
    if lacking and not only_predicted:
        raise ValueError(
            f"predictions lack {_named(lacking, references)} in references; "
            "pass --only-predicted to score only the predicted ids"
        )
    names = [name for name in references if name in predictions]
    return {name: predictions[name] for name in names}, {name: references[name] for name in names}


def _named(lacking: Sequence[str], every: Mapping[str, object]) -> str:
    shown = ", ".join(map(repr, lacking[:5])) + (", ..." if len(lacking) > 5 else "")
    return f"{len(lacking)} ({shown}) of the {len(every)} ids"


def _parsed(path: Path) -> Any:
    """Parse a JSON file, with or without a byte order mark."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#x}): save it "
            "as UTF-8"
        ) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = ", is it cut off?" if error.pos >= len(text.rstrip()) else ""
        raise ValueError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}{cut}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error


def _captions(path: Path, entries: Sequence[Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (place, id, caption) for each entry."""
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: entry {number}"
        fields = _fields(where, entry)
        name = _id(where, fields, "image_id")
        caption = fields.get("caption")
        if not isinstance(caption, str):
            found = _kind(caption) if "caption" in fields else "nothing"
            raise ValueError(f"{where} (image_id {name}): caption must be a string, got {found}")
        yield where, name, caption


def _fields(where: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object, got {_kind(entry)}")
    return entry


def _id(where: str, fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    # isinstance would accept True as an int.
    if type(value) is int or (isinstance(value, str) and value):
        return str(value)
    found = _kind(value) if name in fields else "nothing"
    raise ValueError(f"{where}: {name} must be an integer or a string, got {found}")


def _kind(value: Any) -> str:
    """Describe a JSON value for an error message."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "..."
