"""BLEU, ROUGE-L and CIDEr of captions, by the field's own scorers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

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


def caption_scores(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Score one caption for each id against the references of that id.

    Returns "BLEU-1" to "BLEU-4", "ROUGE-L" and "CIDEr", all times 100 as the field prints them,
    from pycocoevalcap's scorers on the tokens of `tokenize`. CIDEr weighs words by how many ids'
    references have them, so it is that of the whole set, not a mean over parts. Raises ValueError
    if an id is in one of the two only, has no references, or no reference has a word;
    ModuleNotFoundError without pycocoevalcap.
    """
    Bleu, Rouge, Cider = scorers()
    _check(predictions, references)
    hypotheses = {name: [tokenize(caption)] for name, caption in predictions.items()}
    truths = {name: [tokenize(caption) for caption in references[name]] for name in predictions}
    if not any(caption for captions in truths.values() for caption in captions):
        raise ValueError("references hold no word at all")
    bleu, _ = Bleu(4).compute_score(truths, hypotheses, verbose=0)
    rouge, _ = Rouge().compute_score(truths, hypotheses)
    cider, _ = Cider().compute_score(truths, hypotheses)
    scores = {f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)}
    scores |= {"ROUGE-L": rouge, "CIDEr": cider}
    return {name: 100 * float(value) for name, value in scores.items()}


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
    for name, captions in references.items():
        if isinstance(captions, str) or not captions:
            raise ValueError(
                f"references of {name!r} must be a list of at least one caption, got {captions!r}"
            )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
