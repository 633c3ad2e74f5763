"""Checkpoints of the updated parameters and nothing else."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenmix_ops import __version__
from tokenmix_ops.video.captioning import VideoCaptioner
from tokenmix_ops.video.files import replacing
from tokenmix_ops.video.retrieval.retriever import VideoRetriever
from tokenmix_ops.video.tuning import METHODS, Tuning, apply, resolved

FORMAT = "tokenmix_ops.updated/1"

TaskModel = VideoCaptioner | VideoRetriever


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself.

    ``task``; ``tuning``, resolved; ``num_frames`` and ``image_size`` of its videos; ``model``, what
    was tuned, as it was named; ``settings``, the whole resolved configuration; ``figures`` of the
    model, as of the validation split; ``base``, a fingerprint of the weights that stayed frozen.
    """

    task: str
    tuning: Tuning
    num_frames: int
    image_size: int
    model: str
    settings: dict[str, Any]
    figures: dict[str, Any]
    base: str


def updated_tensors(model: TaskModel) -> dict[str, Tensor]:
    """The updated parameters on the CPU, by name. They may be sharded: every rank must call it.

    Raises ValueError if the model was not prepared by `tuning.apply`.
    """
    if model.tuning is None:
        raise ValueError("the model was not tuned: call tokenmix_ops.video.tuning.apply first")
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu().contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def save_updated(
    path: str | os.PathLike[str],
    model: TaskModel,
    *,
    base: str,
    settings: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Writes the updated parameters as safetensors, whole or not at all.

    Args:
        path: the file; an older one is replaced when the new one is complete.
        model: prepared by `tuning.apply`.
        base: the model that was tuned, as ``--model`` takes it.
        settings: the resolved configuration, kept as JSON.
        figures: what the model reached.

    Raises OSError that names the file if it cannot be written.
    """
    tensors = updated_tensors(model)
    assert model.tuning is not None
    metadata: dict[str, str] = {
        "format": FORMAT,
        "tokenmix_ops": __version__,
        "task": model.task,
        "tuning": json.dumps(asdict(resolved(model.tuning))),
        "num_frames": str(model.encoder.num_frames),
        "image_size": str(model.encoder.image_size),
        "model": base,
        "settings": json.dumps(dict(settings or {})),
        "figures": json.dumps(dict(figures or {})),
        "base": fingerprint(model),
    }
    path = Path(path)
    with replacing(path) as part:
        try:
            save_file(tensors, part, metadata)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from error


def describe(path: str | os.PathLike[str]) -> Description:
    """What a checkpoint says of itself.

    Raises ValueError that names the file if it is not there, cut off, or not one of ours.
    """
    return _read(Path(path))[0]


def load_updated(model: TaskModel, path: str | os.PathLike[str]) -> Description:
    """Applies a checkpoint's tuning to a model fresh from its image weights, and its parameters.

    Raises ValueError that names the file and says what differs: the task, the number of frames,
    names, shapes, or the weights that were not updated. Discard the model then.
    """
    description, tensors = _read(Path(path))
    for what, wanted, given in (
        ("task", description.task, model.task),
        ("num_frames", description.num_frames, model.encoder.num_frames),
        ("image_size", description.image_size, model.encoder.image_size),
    ):
        if wanted != given:
            raise ValueError(
                f"{path} was trained with {what}={wanted}, but the model has {what}={given}"
            )
    updated = set(apply(model, description.tuning).updated)
    own = dict(model.named_parameters())
    problems = [
        f"{what} {', '.join(sorted(names)[:5])}" + f" and {len(names) - 5} more" * (len(names) > 5)
        for what, names in (
            ("it lacks", updated - tensors.keys()),
            ("it has besides", tensors.keys() - updated),
        )
        if names
    ]
    problems += [
        f"{name} is {list(tensors[name].shape)}, the model's {list(own[name].shape)}"
        for name in sorted(updated & tensors.keys())
        if tensors[name].shape != own[name].shape
    ][:5]
    if problems:
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems)}")
    if fingerprint(model) != description.base:
        raise ValueError(
            f"{path} was tuned on other weights: on {description.model}, whose frozen parameters "
            "differ from this model's; pass that model"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return description


def fingerprint(model: nn.Module) -> str:
    """Hashes the frozen parameters: names, shapes, and 64 values of each in half precision.

    Leaves out the position embeddings. They are resized to the videos when a model is loaded, and
    the last bits of the result differ between machines.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad and not name.endswith(".position_embedding"):
            flat = parameter.detach().flatten()
            index = torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64).long()
            values = flat[index.to(flat.device)].to("cpu", torch.float16)
            digest.update(f"{name} {list(parameter.shape)} ".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> tuple[Description, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is no checkpoint of tokenmix_ops: expected format {FORMAT!r}, got "
                    f"{metadata.get('format')!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut off or not a safetensors file: {error}") from error
    try:
        return _described(metadata), tensors
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} describes itself in a way that cannot be read, {type(error).__name__}: {error}"
        ) from error


def _described(metadata: dict[str, str]) -> Description:
    tuning = json.loads(metadata["tuning"])
    if tuning["method"] not in METHODS:
        raise ValueError(f"method {tuning['method']!r} is not known")
    if tuning["layers"] is not None:
        tuning["layers"] = tuple(tuning["layers"])
    return Description(
        task=metadata["task"],
        tuning=Tuning(**tuning),
        num_frames=int(metadata["num_frames"]),
        image_size=int(metadata["image_size"]),
        model=metadata["model"],
        settings=json.loads(metadata["settings"]),
        figures=json.loads(metadata["figures"]),
        base=metadata["base"],
    )
