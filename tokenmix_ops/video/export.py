"""Whole transformers model directories, made of tuned models."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from tokenmix_ops.video.captioning import VideoCaptioner
from tokenmix_ops.video.files import complete_folder
from tokenmix_ops.video.retrieval.retriever import VideoRetriever
from tokenmix_ops.video.tuning import METHODS, Tuning


def export(
    model: VideoCaptioner | VideoRetriever,
    folder: str | os.PathLike[str],
    tokenizer: Any | None = None,
) -> Path:
    """Writes a whole transformers model directory; returns it.

    Merges LoRA into the weights. config.json holds under ``tokenmix`` which layers mix tokens:
    transformers itself attends within frames, and `mix_tokens` makes them mix. Raises ValueError
    for methods that insert modules which transformers' BLIP lacks, and FileExistsError if the
    folder is not empty.

    Args:
        model: a captioner or retriever.
        folder: created once everything is written; an existing one must be empty.
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
            task=model.task,
            command="caption" if model.task == "captioning" else "retrieval",
            **whole.config.tokenmix,
        )
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    return folder


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
