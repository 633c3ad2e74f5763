"""BLEU, METEOR, ROUGE-L and CIDEr of captions, by the field's own scorers."""

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
    n't\b | '(?:s|m|d|re|ve|ll)\b   # the ends of contractions
    | \d+(?:[.,:]\d+)+              # 3.5, 10,000, 10:30
    | \w+(?:[-'/]\w+)*              # words, also with such a sign inside
    | \S                            # whatever else, a character each
    """,
    re.VERBOSE,
)
_DROPPED = frozenset("'`\"“”‘’.?!,:;-–—…(){}")


def tokenize(caption: str) -> str:
    """Lower-case a caption, split off what Penn Treebank tokenisation does, drop punctuation.

    Returns the tokens with a space between. Stands in for Stanford's PTBTokenizer, with which
    published numbers are computed: contractions are split as there, words with hyphens and numbers
    stay whole. It differs where that one keeps brackets, as "-lrb-", which the COCO evaluation
    lists as dropped in capitals only, and the full stops of abbreviations.
    """
    text = caption.lower().replace("’", "'")
    for pattern, replacement in _CONTRACTIONS:
        text = pattern.sub(replacement, text)
    return " ".join(token for token in _TOKEN.findall(text) if token not in _DROPPED)


def scorers() -> tuple[Any, Any, Any]:
    """pycocoevalcap's Bleu, Rouge and Cider; ModuleNotFoundError without it."""
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
    """How good captions are, and by what.

    Attributes:
        figures: "BLEU-1" to "BLEU-4", "METEOR", "ROUGE-L" and "CIDEr", as far as they were asked
            for and are available, times 100 as the field prints them.
        tokenizer: what cut captions into the tokens that all of them are of.
        missing: why a figure that was asked for is not available.
    """

    figures: dict[str, float]
    tokenizer: str
    missing: dict[str, str] = field(default_factory=dict)

    def row(self) -> dict[str, float | str | None]:
        """All figures, None where there is none, and "tokenizer"."""
        return {**{name: self.figures.get(name) for name in FIGURES}, "tokenizer": self.tokenizer}


def caption_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    tokenizer: Tokenizer = "auto",
    meteor: bool = True,
    time_limit: float | None = None,
) -> CaptionScores:
    """Score one caption for each id against the references of that id.

    By pycocoevalcap's scorers, on the tokens of Stanford's PTBTokenizer ("ptb"), with which
    published numbers are computed, or of `tokenize` ("python"); "auto" is the first where Java
    runs. METEOR needs Java too. CIDEr weighs words by how many ids' references have them, so it is
    that of the whole set, not a mean over parts. Each Java program, one at a time, may take
    ``time_limit`` seconds; None is ten minutes and 0.01 seconds a character.

    Raises ValueError if an id is in one of the two only, has no references, or no reference has a
    word; ModuleNotFoundError without pycocoevalcap; RuntimeError if "ptb" was asked for and Java
    does not run, or a Java program fails; TimeoutError if one takes too long.
    """
    Bleu, Rouge, Cider = scorers()
    if tokenizer not in get_args(Tokenizer):
        raise ValueError(f"tokenizer is {tokenizer!r}, it must be auto, ptb or python")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit is {time_limit}, it must be seconds above 0")
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
    # In the order of each, as tokens depend a little on the caption before and after.
    texts = dict(zip(predictions, _tokens(predictions.values(), ptb, time_limit), strict=True))
    every = [caption for captions in references.values() for caption in captions]
    rest = iter(_tokens(every, ptb, time_limit))
    truths = {name: [next(rest) for _ in captions] for name, captions in references.items()}
    if not any(caption for captions in truths.values() for caption in captions):
        raise ValueError("references hold no word at all")
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
            raise ValueError(f"{name} lack {len(absent)} ids that the other has: {_few(absent)}")
    if not predictions:
        raise ValueError("predictions are empty, there must be at least one caption")
    for name, caption in predictions.items():
        if not isinstance(caption, str):
            raise ValueError(f"prediction of {name!r} must be a text, got {caption!r:.80}")
    for name, captions in references.items():
        if isinstance(captions, str) or not captions:
            raise ValueError(
                f"references of {name!r} must be a list of at least one caption, got {captions!r}"
            )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
