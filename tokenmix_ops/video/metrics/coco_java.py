"""Runs pycocoevalcap's Java programs: Stanford's PTBTokenizer and METEOR 1.5.

Results equal those of pycocoevalcap's Python wrappers in a UTF-8 environment, with two fixes. Line
breaks inside a caption (also carriage return, vertical tab, form feed, U+2028 and U+2029), which
shift lines there, become spaces. Lone surrogates, which crash the wrappers, become question marks.
As in pycocoevalcap, tokens depend slightly on the next caption ("U.S." at the end of a line may
keep its full stop or not).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tokenmix_ops.video.metrics.java import JavaError, JavaMissing, JavaProgram

PTB = "PTBTokenizer (Stanford CoreNLP 3.4.1)"

_TOKENIZER_JAR = "stanford-corenlp-3.4.1.jar"
_METEOR_JAR = "meteor-1.5.jar"
_PARAPHRASES = "data/paraphrase-en.gz"
_BREAKS = str.maketrans(dict.fromkeys("\n\r\v\f\u2028\u2029", " "))
_NUM_STATISTICS = 23
_SECONDS, _SECONDS_A_CHARACTER = 600.0, 0.01


def ptb_tokenize(java: str, captions: Sequence[str], *, time_limit: float | None) -> list[str]:
    """Tokenize captions: lower-case tokens joined by spaces, without punctuation.

    ``time_limit`` in seconds; None means ten minutes plus 0.01 seconds per character. Raises as
    `JavaProgram` does.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    if not captions:
        return []
    lines = [caption.translate(_BREAKS) for caption in captions]
    arguments = ["-cp", _TOKENIZER_JAR, "edu.stanford.nlp.process.PTBTokenizer"]
    arguments += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    folder = _folder("pycocoevalcap.tokenizer.ptbtokenizer", _TOKENIZER_JAR)
    with JavaProgram(java, arguments, folder, PTB, _limit(time_limit, lines)) as program:
        program.feed(lines, last=True)
        tokenized = program.rest().split("\n")
    if len(tokenized) != len(lines):
        raise JavaError(
            f"expected {len(lines)} lines from {PTB}, one per caption, got {len(tokenized)}: "
            "use the tokenizer 'python' instead"
        )
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATIONS)
        for line in tokenized
    ]


def meteor_score(
    java: str,
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    time_limit: float | None,
) -> float:
    """Return METEOR, from 0 to 1, of tokenised captions against lists of references.

    ``time_limit`` as for `ptb_tokenize`.
    """
    lines = []
    for hypothesis, truths in zip(hypotheses, references, strict=True):
        # The same cleaning as pycocoevalcap; "|||" separates the parts of a line.
        cleaned = hypothesis.replace("|||", "").replace("  ", " ")
        parts = [truth.replace("|||", "") for truth in truths]
        lines.append(" ||| ".join(("SCORE", *parts, cleaned)).translate(_BREAKS))
    # METEOR cannot find this file by itself if its path contains a space.
    arguments = ["-Xmx2G", "-jar", _METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
    arguments += ["-a", _PARAPHRASES]
    folder = _folder("pycocoevalcap.meteor.meteor", _METEOR_JAR, _PARAPHRASES)
    with JavaProgram(java, arguments, folder, "METEOR 1.5", _limit(time_limit, lines)) as program:
        program.feed(lines, last=False)
        statistics = [_numbers(program.line(), _NUM_STATISTICS) for _ in lines]
        program.feed([" ||| ".join(("EVAL", *statistics))], last=True)
        # One score per caption, then the corpus score, which is not their mean.
        scores = [_numbers(program.line(), 1) for _ in range(len(lines) + 1)]
        if extra := program.rest().strip():
            raise JavaError(f"METEOR 1.5 printed unexpected output: {extra[:300]}")
    return float(scores[-1])


def _numbers(line: str, count: int) -> str:
    try:
        found = len([float(part) for part in line.split()])
    except ValueError:
        found = -1
    if found != count:
        raise JavaError(f"expected {count} numbers from METEOR 1.5, got {line[:300]!r}")
    return line


def _folder(module: str, *files: str) -> Path:
    """Return a module's folder; raise JavaMissing for the first of ``files`` that it lacks."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise JavaMissing(f"{module} is missing: reinstall pycocoevalcap")
    folder = Path(spec.origin).resolve().parent
    for file in files:
        if not (folder / file).is_file():
            raise JavaMissing(f"{folder / file} is missing: reinstall pycocoevalcap")
    return folder


def _limit(time_limit: float | None, lines: Sequence[str]) -> float:
    if time_limit is not None:
        return time_limit
    return _SECONDS + _SECONDS_A_CHARACTER * sum(map(len, lines))
