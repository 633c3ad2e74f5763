"""Experiments as YAML: read from config files, composed with a backbone and a method, printed."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from tokenmix_ops.video.experiments.settings import EXPERIMENTS, Captioning, Retrieval
from tokenmix_ops.video.tuning.spec import Tuning

T = TypeVar("T")

EXPERIMENT_FILE = "experiment.yaml"
"""The resolved config of a training run, in its output folder."""


def read_experiment(
    path: str | os.PathLike[str],
    task: str | None = None,
    *,
    backbone: str | None = None,
    tuning: Mapping[str, Any] | None = None,
) -> Any:
    """Reads the `Captioning` or `Retrieval` of a config file, which holds ``task`` and overrides.

    ``backbones`` in it maps names to further overrides. ``backbone`` picks one, by default the
    first. Its ``everything`` holds overrides for tuning the whole model. ``tuning`` overrides
    settings of the file's own ``tuning``.

    Raises ValueError that names the file and the setting for another task than ``task``, an unknown
    name or backbone, or a value of the wrong type; OSError if the file cannot be read.
    """
    path = Path(path)
    try:
        overrides = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(overrides, dict) or overrides.get("task") not in list(EXPERIMENTS):
        raise ValueError(f"{path} must hold a line task: captioning or task: retrieval")
    own = overrides.pop("task")
    if task is not None and own != task:
        raise ValueError(f"{path}: expected task {task}, got {own}")
    try:
        section = _section(overrides.pop("backbones", None), backbone)
        for_everything = section.pop("everything", {})
        experiment: Any = EXPERIMENTS[own]()
        for part in (overrides, section, {"tuning": dict(tuning or {})}):
            experiment = overridden(experiment, part)
        if for_everything and _updates_everything(experiment.tuning):
            experiment = overridden(experiment, for_everything)
        return experiment
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _section(backbones: Any, backbone: str | None) -> dict[str, Any]:
    """The overrides of one backbone; ValueError if it has none."""
    if backbones is None:
        if backbone is not None:
            raise ValueError(f"it has no backbones to choose {backbone} from: leave --backbone out")
        return {}
    if not isinstance(backbones, dict) or not backbones:
        raise ValueError(f"backbones must hold a section for each backbone, got {backbones!r}")
    if backbone is not None and backbone not in backbones:
        raise ValueError(f"expected a backbone out of {', '.join(backbones)}, got {backbone}")
    name = next(iter(backbones)) if backbone is None else backbone
    section = backbones[name]
    if not isinstance(section, dict):
        raise ValueError(f"backbones.{name} must hold settings, got {section!r}")
    if not isinstance(section.get("everything", {}), dict):
        raise ValueError(f"backbones.{name}.everything must hold settings")
    return dict(section)


def _updates_everything(tuning: Tuning) -> bool:
    # It imports PyTorch, which most commands do without.
    from tokenmix_ops.video.tuning import switches_of

    return switches_of(tuning).everything


def overridden(default: T, delta: Mapping[str, Any], where: str = "") -> T:
    """Returns a dataclass with values of a nested mapping in place of its own.

    Raises ValueError for an unknown name or a value of another type.
    """
    hints = typing.get_type_hints(type(default))
    changes = {}
    for name, value in delta.items():
        full = f"{where}{name}"
        if name not in hints:
            raise ValueError(f"{full} is not a setting; there are {', '.join(hints)}")
        present = getattr(default, name)
        if dataclasses.is_dataclass(present):
            if not isinstance(value, dict):
                raise ValueError(f"{full} must hold settings, got {value!r}")
            changes[name] = overridden(present, value, f"{full}.")
        else:
            changes[name] = _converted(value, hints[name], full)
    return dataclasses.replace(default, **changes)  # type: ignore[type-var]


def plain(experiment: Captioning | Retrieval) -> dict[str, Any]:
    """Returns an experiment as nested mappings, lists and numbers, for JSON and YAML."""
    return {"task": experiment.task, **_plain(dataclasses.asdict(experiment))}


def as_yaml(experiment: Captioning | Retrieval) -> str:
    """Returns the resolved config, every setting of it, as `read_experiment` reads it."""
    text: str = yaml.safe_dump(plain(experiment), sort_keys=False, default_flow_style=None)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _converted(value: Any, hint: Any, name: str) -> Any:
    """``value`` as its field wants it: a path of a string, a tuple of a list, a float of an int."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is Literal:
            # YAML 1.1 takes no, without quotes, for False.
            word = "no" if value is False else value
            if word in typing.get_args(option):
                return word
        is_list = typing.get_origin(option) is tuple and isinstance(value, list | tuple)
        if is_list and all(type(part) is typing.get_args(option)[0] for part in value):
            return tuple(value)
        if option is Path and isinstance(value, str):
            return Path(value)
        # YAML 1.1 takes 1e-5, without a dot, for text.
        if option is float and (type(value) in (int, float) or _is_number(value)):
            return float(value)
        if isinstance(option, type) and type(value) is option:
            return value
    raise ValueError(f"{name} must be {_shown(options)}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value) is not None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _shown(options: tuple[Any, ...]) -> str:
    names = []
    for option in options:
        if typing.get_origin(option) is Literal:
            names += [repr(value) for value in typing.get_args(option)]
        elif typing.get_origin(option) is tuple:
            names.append(f"a list of {typing.get_args(option)[0].__name__}")
        else:
            names.append(getattr(option, "__name__", str(option)).replace("NoneType", "null"))
    return " or ".join(names)
