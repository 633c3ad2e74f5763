"""Reads captions and their references from COCO-style JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_predictions(path: Path) -> dict[str, str]:
    """Captions by id, from ``[{"image_id": .., "caption": ".."}, ...]``.

    Ids are strings or whole numbers: 1 and "1" are the same. Raises ValueError naming the file and
    the entry if it is not like that, or has two captions for an id.
    """
    entries = _parsed(path)
    if not isinstance(entries, list):
        raise ValueError(
            f"{path} holds {_kind(entries)}, predictions are a list: "
            '[{"image_id": 1, "caption": "a dog runs"}, ...]'
        )
    predictions: dict[str, str] = {}
    for where, name, caption in _captions(path, entries):
        if name in predictions:
            raise ValueError(f"{where}: image_id {name!r} has a caption already, there must be one")
        predictions[name] = caption
    return predictions


def read_references(path: Path) -> dict[str, list[str]]:
    """Lists of captions by id, from ``{"annotations": [{"image_id": .., "caption": ".."}, ...]}``.

    In the order of "images", ``[{"id": ..}, ...]``, if the file has it, as in the COCO evaluation;
    else in that of the captions. An image without captions has an empty list. Raises ValueError as
    `read_predictions` does.
    """
    document = _parsed(path)
    entries = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError(
            f"{path} holds {_kind(document)} without a list of annotations, references are "
            '{"annotations": [{"image_id": 1, "caption": "a dog runs"}, ...]}'
        )
    references: dict[str, list[str]] = {}
    images = document.get("images", [])
    if not isinstance(images, list):
        raise ValueError(f"{path}: images is {_kind(images)}, it must be a list")
    for number, image in enumerate(images, start=1):
        where = f"{path}: entry {number} of images"
        references[_id(where, _fields(where, image), "id")] = []
    for _, name, caption in _captions(path, entries):
        references.setdefault(name, []).append(caption)
    return references


def write_predictions(path: Path, predictions: Mapping[str, str]) -> None:
    """Writes what `read_predictions` reads."""
    rows = [{"image_id": name, "caption": caption} for name, caption in predictions.items()]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def paired(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    only_predicted: bool = False,
) -> tuple[dict[str, str], dict[str, Sequence[str]]]:
    """Both of the same ids, in the order of the references.

    With ``only_predicted`` references of other ids are left out; an id whose list of references is
    empty has none. Raises ValueError naming ids that one of the two lacks.
    """
    references = {name: captions for name, captions in references.items() if captions}
    if lacking := [name for name in predictions if name not in references]:
        known = next((f"; an id there is {name!r}" for name in references), "")
        raise ValueError(
            f"there are no references for {_named(lacking, predictions)} predicted{known}"
        )
    lacking = [name for name in references if name not in predictions]
    if lacking and not only_predicted:
        raise ValueError(
            f"there are no predictions for {_named(lacking, references)} that have references; "
            "--only-predicted scores those alone that were predicted"
        )
    names = [name for name in references if name in predictions]
    return {name: predictions[name] for name in names}, {name: references[name] for name in names}


def _named(lacking: Sequence[str], every: Mapping[str, object]) -> str:
    shown = ", ".join(map(repr, lacking[:5])) + (", ..." if len(lacking) > 5 else "")
    return f"{len(lacking)} ({shown}) of the {len(every)} ids"


def _parsed(path: Path) -> Any:
    """What a JSON file holds, with or without a byte order mark."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#x}): save it "
            "in that encoding"
        ) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = ", is it cut off?" if error.pos >= len(text.rstrip()) else ""
        raise ValueError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}{cut}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}") from error


def _captions(path: Path, entries: Sequence[Any]) -> Iterator[tuple[str, str, str]]:
    """(where it is, id, caption) of each entry."""
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: entry {number}"
        fields = _fields(where, entry)
        name = _id(where, fields, "image_id")
        caption = fields.get("caption")
        if not isinstance(caption, str):
            found = _kind(caption) if "caption" in fields else "missing"
            raise ValueError(f"{where} (image_id {name}): caption is {found}, it must be a string")
        yield where, name, caption


def _fields(where: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {_kind(entry)}, it must be an object")
    return entry


def _id(where: str, fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    # True is an int to Python.
    if type(value) is int or (isinstance(value, str) and value):
        return str(value)
    found = _kind(value) if name in fields else "missing"
    raise ValueError(f"{where}: {name} is {found}, it must be a whole number or a string")


def _kind(value: Any) -> str:
    """A JSON value in words: itself if it is short, else what it is."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "..."
