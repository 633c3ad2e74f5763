"""Tuning methods on the small video world: who learns what only the order of frames tells.

A tiny captioner and a tiny retriever learn from still
frames, with captions that never mention motion, as BLIP learns from images; each method then tunes
a copy of them on clips that move.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from bench.rows import Row
from tokenmix_ops.timing import environment
from tokenmix_ops.video.data.dataset import Clips, collate
from tokenmix_ops.video.data.manifest import Manifest, read_manifest
from tokenmix_ops.video.data.shapes import MOTIONS, write_world
from tokenmix_ops.video.engine.hyperparameters import Training
from tokenmix_ops.video.engine.store import Store
from tokenmix_ops.video.experiments.evaluating import (
    evaluate_captions,
    evaluate_ranking,
    export_checkpoint,
    open_model,
)
from tokenmix_ops.video.experiments.running import run
from tokenmix_ops.video.experiments.settings import Captioning, Contrast, Opening, Retrieval, Videos
from tokenmix_ops.video.retrieval import VideoRetriever
from tokenmix_ops.video.text import CaptionTokenizer
from tokenmix_ops.video.tuning.spec import Tuning

Task = Literal["captioning", "retrieval"]

CONTENDERS = {
    "token_mixing (P)": Tuning("token_mixing"),
    "spatial (P)": Tuning("spatial"),
    "st_adapter": Tuning("st_adapter"),
    "temporal": Tuning("temporal"),
    "token_mixing (F)": Tuning("token_mixing", everything=True),
    "spatial (F)": Tuning("spatial", everything=True),
}
REVERSED = {"left": "right", "right": "left", "up": "down", "down": "up"}
_ENDS = {"left": "left", "right": "right", "top": "up", "bottom": "down"}


@dataclass(frozen=True)
class World:
    """Sizes of the experiment."""

    clips: int = 4000
    """Clips that move; eight of ten are for training, one each for validation and test."""
    stills: int = 1500
    """Clips of which single frames are learnt from at first."""
    still_epochs: int = 6
    """Epochs on still frames."""
    still_learning_rate: float = 2e-3
    """Highest learning rate on them."""
    epochs: int = 6
    """Epochs of each method."""
    learning_rate: float = 5e-3
    """Highest learning rate of each method."""
    seed: int = 0
    """Of the world and of the training."""


def measure(
    folder: Path, world: World, contenders: Sequence[str], tasks: Sequence[Task], console: Console
) -> Iterator[Row]:
    """A row for each task and contender, as soon as it is there; work is kept in ``folder``."""
    for name in contenders:
        if name not in CONTENDERS:
            raise ValueError(f"{name!r} is no contender; there are {', '.join(CONTENDERS)}")
    for part, count, seed in (
        ("still", world.stills, world.seed + 1000),
        ("moving", world.clips, world.seed),
    ):
        if not (folder / part / "videos.jsonl").exists():
            write_world(folder / part, count, seed=seed, size=56, still=part == "still")
    data = folder / "moving" / "videos.jsonl"
    for task in tasks:
        base = _pretrained(folder, task, world, console)

        def row(name: str, figures: dict[str, float], minutes: float, task: Task = task) -> Row:
            about = {"suite": "world", "task": task, "contender": name, "minutes": minutes}
            return {**about, **figures, "world": dataclasses.asdict(world), **environment()}

        yield row("nothing yet", _figures(task, str(base), data, Opening(num_frames=8)), 0.0)
        for name in contenders:
            out = folder / task / re.sub(r"\W+", "-", name).strip("-")
            experiment = _experiment(
                task, world, folder / "moving", world.epochs, world.learning_rate, 8
            )
            experiment = replace(experiment, model=str(base), tuning=CONTENDERS[name])
            console.print(f"{task}, {name}")
            run(experiment, out, resume=_begun(out), console=console)
            best = str(out / "best.safetensors")
            yield row(name, _figures(task, best, data, Opening()), _minutes(out))


def _experiment(
    task: Task, world: World, folder: Path, epochs: int, learning_rate: float, num_frames: int
) -> Captioning | Retrieval:
    videos = Videos(folder / "videos.jsonl", num_frames=num_frames, image_size=56)
    training = Training(
        epochs=epochs,
        batch_size=32,
        learning_rate=learning_rate,
        weight_decay=0.01,
        schedule="cosine",
        warmup_steps=50,
        max_grad_norm=1.0,
        workers=1,
        seed=world.seed,
        evaluate_every=epochs,
    )
    if task == "captioning":
        return Captioning(videos=videos, training=training)
    return Retrieval(
        videos=videos,
        training=training,
        rerank=16,
        # Captions repeat from clip to clip: in a long queue most positives would count as wrong.
        contrast=Contrast(queue_size=32, momentum=0.95),
    )


def _pretrained(folder: Path, task: Task, world: World, console: Console) -> Path:
    base = folder / task / "base"
    if base.exists():
        return base
    experiment = replace(
        _experiment(
            task, world, folder / "still", world.still_epochs, world.still_learning_rate, 1
        ),
        tiny=True,
        tuning=Tuning("spatial", everything=True),
        tokenizer=str(_words(folder)),
    )
    out = folder / task / "still"
    console.print(f"{task}, still frames")
    run(experiment, out, resume=_begun(out), console=console)
    return export_checkpoint(task, out / "best.safetensors", base)


def _begun(out: Path) -> bool:
    """Whether there is a training to go on with."""
    return Store(out).log.exists()


def _minutes(out: Path) -> float:
    """How long the updates took."""
    lines = map(json.loads, Store(out).log.read_text().splitlines())
    return round(sum(line.get("seconds", 0.0) for line in lines) / 60, 2)


def _words(folder: Path) -> Path:
    """A tokenizer that knows both worlds' words, as BLIP's knows English."""
    words = folder / "words"
    if not words.exists():
        captions = [
            caption
            for part in ("still", "moving")
            for video in read_manifest(folder / part / "videos.jsonl").videos
            for caption in video.captions
        ]
        CaptionTokenizer.from_captions(captions).save(words)
    return words


def _figures(task: Task, checkpoint: str, data: Path, opening: Opening) -> dict[str, float]:
    manifest = read_manifest(data)
    if task == "captioning":
        scores, captions = evaluate_captions(
            checkpoint,
            data,
            None,
            "test",
            opening=opening,
            tokenizer="python",
            meteor=False,
            workers=0,
        )
        assert scores is not None
        right = {v.video_id: motion_of(v.captions[0]) for v in manifest.of_split("test")}
        said = {name: motion_of(caption) for name, caption in captions.items()}
        return {
            "CIDEr": scores.figures["CIDEr"],
            "BLEU-4": scores.figures["BLEU-4"],
            "motion": 100 * sum(said[name] == right[name] for name in right) / len(right),
        }
    figures = evaluate_ranking(checkpoint, data, None, "test", opening=opening, workers=0)
    assert figures is not None
    return {
        "R@1": figures["t2v R@1"],
        "R@5": figures["t2v R@5"],
        "rsum": figures["rsum"],
        "order": 100 * order_accuracy(checkpoint, manifest, opening),
    }


def motion_of(caption: str) -> str | None:
    """The motion that a caption names; None if none."""
    found = re.search(rf"\b(?:moves ({'|'.join(MOTIONS)})|to ({'|'.join(_ENDS)}))\b", caption)
    if found is None:
        return None
    return found.group(1) or _ENDS[found.group(2)]


@torch.no_grad()
def order_accuracy(checkpoint: str, manifest: Manifest, opening: Opening) -> float:
    """How often a test clip is nearer to its caption than to the one that says the reverse."""
    loaded, _ = open_model(checkpoint, Retrieval(), opening)
    retriever = loaded.model
    assert isinstance(retriever, VideoRetriever)
    encoder = retriever.encoder
    clips = Clips(manifest, "test", num_frames=encoder.num_frames, size=encoder.image_size)
    hits = 0.0
    for row, video in enumerate(clips.videos):
        caption = video.captions[0]
        motion = motion_of(caption)
        assert motion is not None
        texts = [caption, caption.replace(f"moves {motion}", f"moves {REVERSED[motion]}")]
        ids, mask = loaded.tokenizer.encode(texts, 35)
        encoded = retriever.encode_videos(collate([clips[row]])["pixels"])
        similarity = retriever.embed_texts(ids, mask) @ encoded.embedding[0]
        memory = retriever.remember(encoded.tokens)
        scores = similarity + retriever.match(ids, mask, memory)[:, 1]
        # A tie counts as a guess.
        hits += 0.5 if abs(float(scores[0] - scores[1])) < 1e-4 else float(scores[0] > scores[1])
    return hits / len(clips)
