"""pycocoevalcap's own Java programs: Stanford's PTBTokenizer, and METEOR 1.5.

They give what pycocoevalcap's Python classes for them give in a UTF-8 environment, where these
work. Where these shift lines, they do not: a caption's line breaks of any kind (also carriage
return, vertical tab, form feed, U+2028 and U+2029) are spaces. Where these stop, they go on: half
a surrogate pair, which UTF-8 cannot write, is a question mark. Tokens depend a little on the
caption after (there is a full stop after "U.S." at the end of a line, or not), as they do there.
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
    """Lower-case tokens of each caption with a space between, without punctuation.

    ``time_limit`` in seconds; None is ten minutes and 0.01 seconds a character. See `JavaProgram`
    for what is raised.
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
            f"{PTB} made {len(tokenized)} lines of {len(lines)} captions: score with the "
            "tokenizer 'python' instead"
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
    """METEOR, from 0 to 1, of tokenised captions, each against a list of references.

    ``time_limit`` as for `ptb_tokenize`.
    """
    lines = []
    for hypothesis, truths in zip(hypotheses, references, strict=True):
        # As pycocoevalcap cleans them; "|||" is between the parts of a line.
        cleaned = hypothesis.replace("|||", "").replace("  ", " ")
        parts = [truth.replace("|||", "") for truth in truths]
        lines.append(" ||| ".join(("SCORE", *parts, cleaned)).translate(_BREAKS))
    # METEOR does not find this file by itself if there is a space in its path.
    arguments = ["-Xmx2G", "-jar", _METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
    arguments += ["-a", _PARAPHRASES]
    folder = _folder("pycocoevalcap.meteor.meteor", _METEOR_JAR, _PARAPHRASES)
    with JavaProgram(java, arguments, folder, "METEOR 1.5", _limit(time_limit, lines)) as program:
        program.feed(lines, last=False)
        statistics = [_numbers(program.line(), _NUM_STATISTICS) for _ in lines]
        program.feed([" ||| ".join(("EVAL", *statistics))], last=True)
        # One score for each, and that of all, which is not their mean.
        scores = [_numbers(program.line(), 1) for _ in range(len(lines) + 1)]
        if extra := program.rest().strip():
            raise JavaError(f"METEOR 1.5 said more than was asked: {extra[:300]}")
    return float(scores[-1])


def _numbers(line: str, count: int) -> str:
    try:
        found = len([float(part) for part in line.split()])
    except ValueError:
        found = -1
    if found != count:
        raise JavaError(f"METEOR 1.5 answered {line[:300]!r} where {count} numbers were due")
    return line


def _folder(module: str, *files: str) -> Path:
    """Where a module is that has files beside it; JavaMissing names the one that is not there."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise JavaMissing(f"{module} is missing: install pycocoevalcap again")
    folder = Path(spec.origin).resolve().parent
    for file in files:
        if not (folder / file).is_file():
            raise JavaMissing(f"{folder / file} is missing: install pycocoevalcap again")
    return folder


def _limit(time_limit: float | None, lines: Sequence[str]) -> float:
    if time_limit is not None:
        return time_limit
    return _SECONDS + _SECONDS_A_CHARACTER * sum(map(len, lines))
