"""Search on the small video world: how often what is found is what the query describes.

``python -m tokenmix_ops.bench.search_world``: a tiny retriever is trained for minutes, new clips
are indexed, in one go and by a process that is killed midway and gone on with, and every caption of
theirs is a query. A clip is right if the query is one of its captions, that is if colour, shape and
motion are those of the query. A row of data for each way of ranking.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from safetensors import safe_open

from tokenmix_ops.bench.measure import environment
from tokenmix_ops.bench.render import write_rows
from tokenmix_ops.bench.suites import Row
from tokenmix_ops.video.data.manifest import read_manifest
from tokenmix_ops.video.data.shapes import write_world
from tokenmix_ops.video.engine.settings import Training
from tokenmix_ops.video.engine.store import Store
from tokenmix_ops.video.experiments.running import run
from tokenmix_ops.video.experiments.settings import Contrast, Retrieval, Videos
from tokenmix_ops.video.search import Answer, SearchModel, search, update_index
from tokenmix_ops.video.tuning.settings import Tuning

TOP = 5
ATTRIBUTES = ("colour", "shape", "motion")


@dataclass(frozen=True)
class Sizes:
    """Of the experiment."""

    clips: int = 3000
    """Clips to train on; eight of ten are used."""
    updates: int = 3300
    """Updates of the training, of 16 clips each."""
    searched: int = 200
    """New clips that are indexed and searched."""
    rerank: int = 20
    """Best candidates that the matching head ranks anew, in the second row."""
    seed: int = 0
    """Of the clips and of the training."""


def measure(folder: Path, sizes: Sizes, console: Console) -> Iterator[Row]:
    """A row without re-ranking and one with; work is kept in ``folder``."""
    training = _trained(folder, sizes, console)
    checkpoint = str(training / "last.safetensors")
    log = map(json.loads, Store(training).log.read_text().splitlines())
    minutes = sum(line.get("seconds", 0.0) for line in log) / 60
    if not (folder / "clips" / "videos.jsonl").exists():
        write_world(folder / "clips", sizes.searched, seed=sizes.seed + 5000, size=56)
    manifest = read_manifest(folder / "clips" / "videos.jsonl")
    captions = {Path(video.video).name: video.captions for video in manifest.videos}
    videos, one_go, killed = folder / "clips" / "videos", folder / "one go", folder / "killed"
    for index in (one_go, killed):
        shutil.rmtree(index, ignore_errors=True)
    model = SearchModel(checkpoint)
    began = time.monotonic()
    found = update_index(model, videos, one_go)
    seconds = time.monotonic() - began
    kept = _killed(checkpoint, videos, killed)
    update_index(model, videos, killed)
    names = ("embeddings.safetensors", "videos.jsonl")
    same = all((one_go / name).read_bytes() == (killed / name).read_bytes() for name in names)
    queries = sorted({text for texts in captions.values() for text in texts})
    for rerank in (0, sizes.rerank):
        answers = search(model, found, queries, top=TOP, rerank=rerank)
        yield {
            "suite": "search",
            "rerank": rerank,
            **figures(answers, captions),
            "queries": len(queries),
            "minutes": round(minutes, 2),
            "index_seconds": round(seconds, 2),
            "videos_kept_by_the_killed": kept,
            "same_index_after_a_kill": same,
            "sizes": dataclasses.asdict(sizes),
            **environment(),
        }


def figures(
    answers: Sequence[Answer], captions: Mapping[str, Sequence[str]], top: int = TOP
) -> dict[str, float]:
    """Percent of the clips' captions for which the best hit, or any of the best, is right.

    Beside them how often a clip drawn at random would be, and how often the best hit has the
    query's colour, shape and motion. ``captions`` are of each clip, by file name.
    """
    described = {query: attributes(texts) for texts in captions.values() for query in texts}
    # A caption that several clips share counts as often.
    weights = {
        answer.query: sum(answer.query in texts for texts in captions.values())
        for answer in answers
    }
    total = sum(weights.values())

    def percent(value: Callable[[Answer], float]) -> float:
        return 100 * sum(weights[answer.query] * value(answer) for answer in answers) / total

    def right(answer: Answer) -> list[bool]:
        return [answer.query in captions[hit.path.name] for hit in answer.hits]

    def chance(answer: Answer, draws: int) -> float:
        wrong = len(captions) - weights[answer.query]
        return 1 - math.comb(wrong, draws) / math.comb(len(captions), draws)

    found = {
        "top_1": percent(lambda answer: right(answer)[0]),
        f"top_{top}": percent(lambda answer: any(right(answer))),
        "chance_1": percent(lambda answer: chance(answer, 1)),
        f"chance_{top}": percent(lambda answer: chance(answer, top)),
    }
    for place, name in enumerate(ATTRIBUTES):

        def alike(answer: Answer, place: int = place) -> bool:
            best = attributes(captions[answer.hits[0].path.name])
            return best[place] == described[answer.query][place]

        found[name] = percent(alike)
    return found


def attributes(captions: Sequence[str]) -> tuple[str, ...]:
    """Colour, shape and motion of a clip, from "a red circle moves left" among its captions."""
    words = next(text for text in captions if " moves " in text).split()
    return words[1], words[2], words[4]


def _trained(folder: Path, sizes: Sizes, console: Console) -> Path:
    data = folder / "world" / "videos.jsonl"
    if not data.exists():
        write_world(folder / "world", sizes.clips, seed=sizes.seed, size=56)
    experiment = Retrieval(
        # A grid of 5 x 5 patches, whose width no number of frames divides.
        videos=Videos(data, num_frames=3, image_size=40, select_on="none"),
        tiny=True,
        max_tokens=14,
        rerank=0,
        tuning=Tuning("token_mixing", everything=True),
        training=Training(
            epochs=sizes.updates,
            max_steps=sizes.updates,
            batch_size=16,
            learning_rate=2e-3,
            weight_decay=0.01,
            schedule="cosine",
            warmup_steps=100,
            max_grad_norm=1.0,
            workers=1,
            seed=sizes.seed,
        ),
        # Captions repeat from clip to clip: in a long queue most positives would count as wrong.
        contrast=Contrast(queue_size=48, momentum=0.95, alpha=0.0),
    )
    out = folder / "training"
    run(experiment, out, resume=Store(out).log.exists(), console=console)
    return out


def _killed(checkpoint: str, videos: Path, index: Path) -> int:
    """Kills a process that indexes as soon as it has kept something; how many videos those are."""
    command = [sys.executable, "-m", "tokenmix_ops.video.cli", "retrieval", "search"]
    process = subprocess.Popen(
        [*command, checkpoint, videos, "--index", index], stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(index.glob("parts/*.safetensors")):
        time.sleep(0.001)
    process.kill()
    process.wait()
    parts = list(index.glob("parts/*.safetensors"))
    if not parts or (index / "videos.jsonl").exists():
        raise RuntimeError(f"{index} was not to be whole yet: search more clips")
    return sum(_count(part) for part in parts)


def _count(part: Path) -> int:
    with safe_open(part, "pt") as file:
        return int(file.get_slice("embeddings").get_shape()[0])


def main(
    out: Path = Path("runs/search"),
    results: Path = Path("results"),
    sizes: tyro.conf.OmitArgPrefixes[Sizes] = Sizes(),
) -> None:
    """Trains a tiny retriever, searches new clips by their captions, and writes rows of data.

    Example: python -m tokenmix_ops.bench.search_world --out runs/search

    Args:
        out: folder for the clips, the training and the indexes; what is there is gone on with.
        results: folder of the rows of data.
        sizes: of the experiment.
    """
    console = Console(highlight=False)
    rows = []
    for row in measure(out, sizes, console):
        rows.append(row)
        shown = {k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()}
        console.print({name: shown[name] for name in list(shown)[1:-8]})
    write_rows(results / "search-cpu.jsonl", rows)


if __name__ == "__main__":
    tyro.cli(main)
