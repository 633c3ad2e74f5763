"""Checkpoints with what was updated and nothing else, and whole model directories made of them."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenmix_ops import __version__
from tokenmix_ops.video.captioning import VideoCaptioner
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
    """The updated parameters on the CPU, by name; every rank must call it, for they may be sharded.

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
    """Writes the updated parameters as safetensors, by a temporary name.

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
    metadata = {
        "format": FORMAT,
        "tokenmix_ops": __version__,
        "task": task_of(model),
        "tuning": json.dumps(asdict(resolved(model.tuning))),
        "num_frames": str(model.encoder.num_frames),
        "image_size": str(model.encoder.image_size),
        "model": base,
        "settings": json.dumps(dict(settings or {})),
        "figures": json.dumps(dict(figures or {})),
        "base": fingerprint(model),
    }
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    try:
        save_file(tensors, unfinished, metadata)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error


def describe(path: str | os.PathLike[str]) -> Description:
    """What a checkpoint says of itself.

    Raises ValueError that names the file if it is not there, cut off, or not one of ours.
    """
    return _read(Path(path))[0]


def load_updated(model: TaskModel, path: str | os.PathLike[str]) -> Description:
    """Applies a checkpoint's tuning to a model fresh from its image weights, and its parameters.

    Raises ValueError that names the file and says what differs: the task, the number of frames,
    names, shapes, or the weights that were not updated. The model is to be thrown away then.
    """
    description, tensors = _read(Path(path))
    for what, wanted, given in (
        ("task", description.task, task_of(model)),
        ("num_frames", description.num_frames, model.encoder.num_frames),
        ("image_size", description.image_size, model.encoder.image_size),
    ):
        if wanted != given:
            raise ValueError(f"{path} is of {what} {wanted}, the model of {given}")
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


def export(model: TaskModel, folder: str | os.PathLike[str], tokenizer: Any | None = None) -> Path:
    """Writes a whole transformers model directory; returns it.

    LoRA is added into the weights. What mixes is noted in config.json under ``tokenmix``, for
    transformers itself attends within frames: `mix_tokens` makes it mix. Raises ValueError for
    methods that insert modules which transformers' BLIP does not have, and FileExistsError if there
    is something in the folder.

    Args:
        model: a captioner or retriever.
        folder: is made, when all is written; one that is there already must be empty.
        tokenizer: a `CaptionTokenizer` to write beside the weights.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already: choose another name, or remove it")
    tuning = model.tuning or Tuning("frozen")
    tower = "encoder.vision_model."
    method = METHODS[tuning.method]
    vision = method.plain_weights(model.encoder)
    whole = type(model).blip_class(copy.deepcopy(model.blip_config))
    weights = {f"vision_model.{name}": value for name, value in vision.items()}
    weights |= {n: value for n, value in model.state_dict().items() if not n.startswith(tower)}
    foreign = sorted(weights.keys() - whole.state_dict().keys())
    if foreign:
        raise ValueError(
            f"method {tuning.method!r} inserts modules that transformers' BLIP does not have "
            f"({foreign[0]}, ...): keep the checkpoint, and load it with load_updated"
        )
    whole.load_state_dict(weights)
    layers = method.mixing_layers(tuning, len(model.encoder.layers))
    whole.config.tokenmix = {
        "num_frames": model.encoder.num_frames,
        "mixing": tuning.mixing if layers else "spatial",
        "layers": list(layers),
    }
    with complete_folder(folder) as unfinished:
        whole.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save(unfinished)
        card = _CARD.format(
            name=folder.name,
            task=task_of(model),
            command="caption" if task_of(model) == "captioning" else "retrieval",
            **whole.config.tokenmix,
        )
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    return folder


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name ``folder`` at the end, if all went well.

    Raises OSError if there is a file of that name, or a folder that is not empty.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        # In a folder of its own, which has the usual permissions.
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        yield unfinished
        if folder.exists():
            folder.rmdir()
        unfinished.replace(folder)


_CARD = """# {name}

A BLIP model for video {task}, of {num_frames} frames a video; layers that mix tokens across frames:
{layers}, {mixing}.

With tokenmix_ops it works as it is: `tokenmix {command} evaluate {name} --data videos.jsonl`.

transformers loads it, but its own attention stays within frames, and its `generate` captions each
frame by itself. So make the layers above mix, if there are any, with the frames of a video in a row
in the batch, and join them before the text model reads them:

```python
tokenmix_ops.mix_tokens(model.vision_model, {num_frames}, "{mixing}", {layers})
frames = model.vision_model(pixel_values=pixels).last_hidden_state  # [batch * {num_frames}, ...]
video = frames.unflatten(0, (-1, {num_frames})).flatten(1, 2)  # the text's encoder_hidden_states
```
"""


def task_of(model: TaskModel) -> str:
    """ "captioning" or "retrieval"."""
    return "captioning" if isinstance(model, VideoCaptioner) else "retrieval"


def fingerprint(model: nn.Module) -> str:
    """Of the frozen parameters: names, shapes, and 64 values of each in half precision.

    But for the position embeddings, which are resized to the videos when a model is loaded: the
    last bits of that differ between machines.
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
                    f"{path} is no checkpoint of tokenmix_ops: its format is "
                    f"{metadata.get('format')!r}, wanted {FORMAT!r}"
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
