"""Search on the small video world: how often what is found is what the query describes.

The retriever is one that `bench.world` trained. New clips are indexed, once in one go and once by a
process that is killed midway and then resumed, and each of their captions is a query. A clip is
right if the query is one of its captions, that is if it has the query's colour, shape and motion.
There is a row of data for each way of ranking.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

from bench.rows import Row
from tokenmix_ops.timing import environment
from tokenmix_ops.video.data.manifest import read_manifest
from tokenmix_ops.video.data.shapes import write_world
from tokenmix_ops.video.search import Answer, SearchModel, search, update_index

TOP = 5
ATTRIBUTES = ("colour", "shape", "motion")


def measure(checkpoint: str, folder: Path, clips: int, rerank: int, seed: int) -> Iterator[Row]:
    """A row without re-ranking and one with; clips and indexes are kept in ``folder``."""
    write_world(folder / "clips", clips, seed=seed, size=56)
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
    for best in (0, rerank):
        answers = search(model, found, queries, top=TOP, rerank=best)
        yield {
            "suite": "search",
            "rerank": best,
            **figures(answers, captions),
            "queries": len(queries),
            "index_seconds": round(seconds, 2),
            "videos_kept_by_the_killed": kept,
            "same_index_after_a_kill": same,
            "clips": clips,
            "seed": seed,
            "checkpoint": Path(checkpoint).name,
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
