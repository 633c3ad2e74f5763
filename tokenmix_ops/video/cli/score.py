"""``tokenmix score``: the field's metrics of captions in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional


def score(
    predictions: Positional[Path],
    references: Positional[Path],
    split: Literal["train", "val", "test"] = "test",
    only_predicted: bool = False,
    tokenizer: Literal["auto", "ptb", "python"] = "auto",
    no_meteor: bool = False,
    time_limit: float | None = None,
    json: bool = False,
) -> None:
    """Scores captions against references: BLEU, METEOR, ROUGE-L and CIDEr.

    Example: tokenmix score captions.json references.json

    Args:
        predictions: JSON, a list of {"image_id": 1, "caption": "a dog runs"}, one for each id.
        references: JSON, {"annotations": [{"image_id": 1, "caption": "a dog runs"}, ...]}, or
            JSON lines of videos, as `tokenmix data prepare` writes them.
        split: which videos, if the references are JSON lines.
        only_predicted: leave out references of ids that were not predicted.
        tokenizer: ptb, Stanford's, with which published numbers are computed, needs Java; python,
            our own, does not; auto is ptb where Java runs.
        no_meteor: leave METEOR out, which needs Java.
        time_limit: seconds for each Java program; by default ten minutes, more for many captions.
        json: print the figures as JSON; METEOR is null if it is not available.
    """
    import sys

    from rich.console import Console

    from tokenmix_ops.video.cli.figures import show_scores
    from tokenmix_ops.video.data.manifest import read_manifest
    from tokenmix_ops.video.metrics.caption_files import paired, read_predictions, read_references
    from tokenmix_ops.video.metrics.captions import caption_scores

    predicted = read_predictions(predictions)
    if references.suffix == ".jsonl":
        videos = read_manifest(references).of_split(split)
        truths = {video.video_id: list(video.captions) for video in videos}
    else:
        truths = read_references(references)
    predicted, kept = paired(predicted, truths, only_predicted=only_predicted)
    if wordless := sum(not captions for captions in truths.values()):
        left_out = f"{wordless:,} of the {len(truths):,} ids in {references}"
        print(f"without captions, and left out: {left_out}", file=sys.stderr)
    with Console(stderr=True).status("scoring"):
        scores = caption_scores(
            predicted, kept, tokenizer=tokenizer, meteor=not no_meteor, time_limit=time_limit
        )
    num_references = sum(map(len, kept.values()))
    show_scores(scores, as_json=json, ids=len(predicted), references=num_references)
