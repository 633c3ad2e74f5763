"""BLEU, METEOR, ROUGE-L and CIDEr of captions, computed by pycocoevalcap."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tokenmix_ops.video.metrics.coco_java import PTB, meteor_score, ptb_tokenize
from tokenmix_ops.video.metrics.java import JavaMissing, find_java

Tokenizer = Literal["auto", "ptb", "python"]

OWN = "tokenmix_ops' own"
FIGURES = (*(f"BLEU-{n}" for n in range(1, 5)), "METEOR", "ROUGE-L", "CIDEr")

# Contractions as in the Penn Treebank: do n't, man 's, can not.
_CONTRACTIONS = (
    (re.compile(r"(?<=\w)n't\b"), " n't"),
    (re.compile(r"(?<=\w)'(s|m|d|re|ve|ll)\b"), r" '\1"),
    (re.compile(r"\bcannot\b"), "can not"),
)
_TOKEN = re.compile(
    r"""
    n't\b | '(?:s|m|d|re|ve|ll)\b   # contraction endings
    | \d+(?:[.,:]\d+)+              # 3.5, 10,000, 10:30
    | \w+(?:[-'/]\w+)*              # words, which may contain - ' /
    | \S                            # any other single character
    """,
    re.VERBOSE,
)
_DROPPED = frozenset("'`\"“”‘’.?!,:;-–—…(){}")


def tokenize(caption: str) -> str:
    """Lower-case a caption, split it as Penn Treebank tokenisation does, and drop punctuation.

    Returns the tokens joined by spaces. Approximates Stanford's PTBTokenizer, which published
    numbers use: it splits contractions, and keeps hyphenated words and numbers whole. PTBTokenizer
    also keeps the full stops of abbreviations, and brackets as "-lrb-", because the COCO evaluation
    drops only the upper-case form.
    """
    text = caption.lower().replace("’", "'")
    for pattern, replacement in _CONTRACTIONS:
        text = pattern.sub(replacement, text)
    return " ".join(token for token in _TOKEN.findall(text) if token not in _DROPPED)


def scorers() -> tuple[Any, Any, Any]:
    """Import pycocoevalcap's Bleu, Rouge and Cider; raise ModuleNotFoundError without it."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"caption scores need {error.name!r}: pip install 'tokenmix_ops[metrics]'",
            name=error.name,
        ) from error
    return Bleu, Rouge, Cider


@dataclass(frozen=True)
class CaptionScores:
    """Caption scores, and how they were computed.

    Attributes:
        figures: "BLEU-1" to "BLEU-4", "METEOR", "ROUGE-L" and "CIDEr", those requested and
            available, times 100 as is customary.
        tokenizer: the tokenizer behind all scores.
        missing: the reason for each requested score that is unavailable.
    """

    figures: dict[str, float]
    tokenizer: str
    missing: dict[str, str] = field(default_factory=dict)

    def row(self) -> dict[str, float | str | None]:
        """All figures, None for missing ones, and "tokenizer"."""
        return {**{name: self.figures.get(name) for name in FIGURES}, "tokenizer": self.tokenizer}


def caption_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    tokenizer: Tokenizer = "auto",
    meteor: bool = True,
    time_limit: float | None = None,
) -> CaptionScores:
    """Score one caption per id against the references for that id.

    Runs pycocoevalcap's scorers on tokens from Stanford's PTBTokenizer ("ptb"), which published
    numbers use, or from `tokenize` ("python"); "auto" picks "ptb" if Java runs. METEOR also needs
    Java. CIDEr weights words by document frequency over all ids, so it is a score of the whole set,
    not a mean over parts. Each Java program may take ``time_limit`` seconds; None means ten minutes
    plus 0.01 seconds per character.

    Raises ValueError if predictions and references have different ids, an id has no references, or
    no reference has a word; ModuleNotFoundError without pycocoevalcap; RuntimeError if "ptb" is
    requested and Java does not run, or a Java program fails; TimeoutError if one takes too long.
    """
    Bleu, Rouge, Cider = scorers()
    if tokenizer not in get_args(Tokenizer):
        raise ValueError(f"expected tokenizer to be auto, ptb or python, got {tokenizer!r}")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"expected time_limit above 0 seconds, got {time_limit}")
    _check(predictions, references)
    java, no_java = None, ""
    if tokenizer != "python" or meteor:
        try:
            java = find_java()
        except JavaMissing as error:
            if tokenizer == "ptb":
                raise
            no_java = str(error)
    ptb = None if tokenizer == "python" else java
    # Keep each mapping's order: PTB tokens depend slightly on the neighbouring captions.
    texts = dict(zip(predictions, _tokens(predictions.values(), ptb, time_limit), strict=True))
    every = [caption for captions in references.values() for caption in captions]
    rest = iter(_tokens(every, ptb, time_limit))
    truths = {name: [next(rest) for _ in captions] for name, captions in references.items()}
    if not any(caption for captions in truths.values() for caption in captions):
        raise ValueError("expected at least one word in references, got none")
    hypotheses = {name: [texts[name]] for name in truths}
    bleu, _ = Bleu(4).compute_score(truths, hypotheses, verbose=0)
    figures = {f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)}
    missing = {}
    if meteor and java is None:
        missing["METEOR"] = f"not available: {no_java}"
    elif meteor and java is not None:
        try:
            figures["METEOR"] = meteor_score(
                java, [texts[name] for name in truths], list(truths.values()), time_limit=time_limit
            )
        except JavaMissing as error:
            missing["METEOR"] = f"not available: {error}"
    figures["ROUGE-L"], _ = Rouge().compute_score(truths, hypotheses)
    figures["CIDEr"], _ = Cider().compute_score(truths, hypotheses)
    scores = {name: 100 * float(figures[name]) for name in FIGURES if name in figures}
    return CaptionScores(scores, OWN if ptb is None else PTB, missing)


def _tokens(captions: Iterable[str], ptb: str | None, time_limit: float | None) -> list[str]:
    if ptb is None:
        return [tokenize(caption) for caption in captions]
    return ptb_tokenize(ptb, list(captions), time_limit=time_limit)


def _check(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    for name, ids, others in (
        ("predictions", predictions.keys(), references.keys()),
        ("references", references.keys(), predictions.keys()),
    ):
        absent = sorted(map(repr, others - ids))
        if absent:
            raise ValueError(
                "predictions and references must have the same ids, but "
                f"{name} lack {len(absent)}: {_few(absent)}"
            )
    if not predictions:
        raise ValueError("expected at least one prediction, got none")
    for name, caption in predictions.items():
        if not isinstance(caption, str):
            raise ValueError(f"prediction for {name!r} must be a string, got {caption!r:.80}")
    for name, captions in references.items():
        if isinstance(captions, str) or not captions:
            raise ValueError(
                f"references for {name!r} must be a non-empty list of captions, got {captions!r}"
            )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
