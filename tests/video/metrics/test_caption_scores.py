"""Scores by pycocoevalcap's Java programs against those it gives by hand; and all that may happen
to such a program."""

import gzip
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import uuid
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import psutil
import pytest
from waiting import once, wait_until

from tokenmix_ops.video.metrics.captions import FIGURES, OWN, caption_scores, tokenize
from tokenmix_ops.video.metrics.coco_java import PTB, meteor_score, ptb_tokenize
from tokenmix_ops.video.metrics.java import JavaError, JavaMissing, JavaProgram, find_java


def java_or_reason():
    try:
        return find_java(), None
    except JavaMissing as error:
        return None, str(error)


JAVA, NO_JAVA = java_or_reason()
# Programs that run this short are not worth compiling well.
QUICK = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
needs_java = pytest.mark.skipif(JAVA is None, reason=NO_JAVA or "")
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")

# (prediction, references); pycocoevalcap by hand keeps the lines of all of these.
ODD = [
    ("a man is playing a guitar", ["A man plays the guitar.", "a man's guitar: it isn't quiet"]),
    ("Two dogs run in the U.S.", ["two dogs run in the U.S.", "The U.S. has dogs"]),
    ("The end etc.", ["it ends, etc.", "Mr. Smith's end"]),
    ("IŞIK İSTANBUL I SIT", ["ışık istanbul i sit", "I SIT IN ISTANBUL"]),
    ("ein Café für Männer", ["EIN CAFÉ FÜR MÄNNER", "cafe\u0301 naïve"]),
    ("猫 が 座る", ["猫 が 座る", "a cat sits"]),
    ("a 😀 face 👩‍👩‍👧", ["a smiling 😀 face", "👩‍👩‍👧"]),
    ("", ["nothing is said", ""]),
    ("...", ["!?", "a pause"]),
    ("a ||| b", ["a b", "||| a |||"]),
    ("two\nlines of\n\ntext", ["two lines of text", "\n"]),
    ("tab\there \t ", ["  tab   here", "a tab"]),
    ("nul\0nul \x01\x1f\x7f", ["nul nul", "\0"]),
    ("next\x85line and\xa0space\u3000wide", ["next line and space wide"]),
    ("\"quoted\" ``back'' 'single'", ["quoted back single", "“quoted” ‘single’"]),
    ("(brackets) [of] {kinds}", ["-LRB- brackets -RRB-", "brackets of kinds"]),
    ("1 1/2 cups, 3.5 % of 10,000", ["1 1/2 cups", "10,000 cups at 10:30 p.m."]),
    ("see http://a.b/c?d=e&f <a href='x'>y</a>", ["see a link", "<!-- no"]),
    ("zero\u200bwidth\ufeff \u00adsoft", ["zero width soft"]),
    ("can't gonna cannot 'tis o'clock", ["can not going to", "it is o'clock"]),
    ("well-known and/or -- dash – long — dashes", ["well-known dashes"]),
    ("$5 £6 €7 #8 @name &amp; 50%", ["5 dollars", "$ 5"]),
    ("feline sitting on rugs", ["a cat sat on a carpet", "cats sit on rugs"]),
    ("word " * 100, ["word " * 99 + "end", "a word"]),
    ("SCORE EVAL ||| 1 2 3", ["score eval"]),
    ("ﬁ ǅ ß ΑΣ", ["fi ss ας"]),
    ("a kid 's ball rolls .", ["the kid's ball rolls", "a ball"]),
    ("A.B. and C. D. Jr.", ["A.B. and C.D."]),
    ("x" * 3000, ["x" * 3000, "y"]),
    ("the last one .", ["the last one", "One at last..."]),
]
PREDICTIONS = {f"video{n}": prediction for n, (prediction, _) in enumerate(ODD)}
REFERENCES = {f"video{n}": references for n, (_, references) in enumerate(ODD)}

BY_HAND = """
import json, sys
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

texts, truths = json.load(sys.stdin)
ptb = PTBTokenizer()
truths = ptb.tokenize({k: [{"caption": c} for c in captions] for k, captions in truths.items()})
texts = ptb.tokenize({k: [{"caption": caption}] for k, caption in texts.items()})
bleu, _ = Bleu(4).compute_score(truths, texts, verbose=0)
figures = {f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)}
for name, scorer in (("METEOR", Meteor()), ("ROUGE-L", Rouge()), ("CIDEr", Cider())):
    figures[name] = float(scorer.compute_score(truths, texts)[0])
print(json.dumps([figures, truths]))
"""


def copy_of_pycocoevalcap(folder):
    """A copy with a part of METEOR's paraphrases, as reading them all takes seconds."""
    original = Path(find_spec("pycocoevalcap.meteor.meteor").origin).parents[1]
    copy = folder / "pycocoevalcap"
    without = shutil.ignore_patterns("spice", "__pycache__", "paraphrase-en.gz")
    shutil.copytree(original, copy, ignore=without)
    paraphrases = Path("meteor", "data", "paraphrase-en.gz")
    with gzip.open(original / paraphrases) as whole, gzip.open(copy / paraphrases, "w") as part:
        part.writelines(islice(whole, 30_000))
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", QUICK)


@pytest.fixture(scope="session")
def by_hand(tmp_path_factory):
    """[figures from 0 to 1, tokens of the references] of the odd captions."""

    def score(folder):
        variables = {"PYTHONPATH": str(copy_of_pycocoevalcap(folder)), "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            [sys.executable, "-c", BY_HAND],
            input=json.dumps([PREDICTIONS, REFERENCES]),
            env={**os.environ, **variables, "JAVA_TOOL_OPTIONS": QUICK},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        (folder / "by_hand.json").write_text(done.stdout)

    return json.loads((once(tmp_path_factory, "by_hand", score) / "by_hand.json").read_text())


@pytest.fixture(scope="session")
def odd_place(tmp_path_factory):
    return copy_of_pycocoevalcap(tmp_path_factory.mktemp("a space:a colon, 100%20 é"))


@pytest.fixture
def installed(odd_place, monkeypatch):
    """pycocoevalcap is the copy in a folder with an odd name."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(odd_place)
    return odd_place / "pycocoevalcap"


@pytest.fixture
def java_runs(monkeypatch):
    """Ids of the processes that have been started since and still run, but not our own."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("TOKENMIX_TEST_RUN", mark)

    def marked():
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TOKENMIX_TEST_RUN") == mark:
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    return marked


def content(folder):
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def score(_):
    return caption_scores(PREDICTIONS, REFERENCES)


@needs_java
@needs_fork
def test_two_processes_at_once_in_a_hostile_place_equal_pycocoevalcap_by_hand(
    by_hand, installed, tmp_path, monkeypatch, java_runs
):
    """Turkish has an i without a dot, German a comma in 0,5."""
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", f"-Duser.language=de -Duser.country=DE {QUICK}")
    turkish = "-Duser.language=tr -Duser.country=TR -Dfile.encoding=ISO-8859-9 -XX:+UsePerfData"
    monkeypatch.setenv("_JAVA_OPTIONS", f"{turkish} -Djava.io.tmpdir={tmp_path}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    import pycocoevalcap.bleu.bleu
    import pycocoevalcap.cider.cider
    import pycocoevalcap.rouge.rouge
    import pycocoevalcap.tokenizer.ptbtokenizer  # noqa: F401

    before = content(installed)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(score, range(2), chunksize=1)
    for scores in found:
        assert scores.tokenizer == PTB
        assert scores.missing == {}
        assert tuple(scores.figures) == FIGURES
        wanted = {name: 100 * value for name, value in by_hand[0].items()}
        assert scores.figures == pytest.approx(wanted, rel=0, abs=1e-9)
    assert content(installed) == before
    assert list(tmp_path.iterdir()) == []
    assert java_runs() == []


@needs_java
def test_tokens_are_those_of_pycocoevalcap_by_hand(by_hand):
    captions = [caption for references in REFERENCES.values() for caption in references]
    tokens = [caption for references in by_hand[1].values() for caption in references]
    assert ptb_tokenize(JAVA, captions, time_limit=None) == tokens
    assert ptb_tokenize(JAVA, [], time_limit=None) == []


@pytest.mark.interfaces
@needs_java
def test_whatever_a_caption_holds_no_line_is_shifted():
    rng = random.Random(0)
    ends = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029", "\ud83d", "\0"]
    captions = []
    for number in range(3000):
        odd = [chr(rng.choice([rng.randrange(0x300), rng.randrange(0x110000)])) for _ in range(6)]
        pieces = [*odd, rng.choice(ends), rng.choice(["<", "-", "U.S.", "<!--", '"', "1"])]
        rng.shuffle(pieces)
        captions += ["".join(pieces), f"marker{number}"]
    # More than a pipe holds, of output and of warnings: that emoji are left out.
    captions += ["😀 a dog runs"] * 20_000
    tokens = ptb_tokenize(JAVA, captions, time_limit=None)
    assert tokens[1:6000:2] == [f"marker{number}" for number in range(3000)]
    assert tokens[6000:] == ["a dog runs"] * 20_000


@needs_java
def test_captions_that_stop_pycocoevalcap_are_scored(installed):
    words = " ".join(f"word{number}" for number in range(400))
    predictions = {"a": "a\rdog\u2028runs", "b": "\ud83d", "c": words}
    references = {"a": ["a dog runs"], "b": ["\f", "a cat"], "c": [words]}
    figures = caption_scores(predictions, references, tokenizer="ptb").figures
    same = {"a": "a dog runs", "b": "?", "c": words}
    assert figures == caption_scores(same, {**references, "b": ["", "a cat"]}).figures
    assert figures["METEOR"] > 60
    silent = caption_scores(dict.fromkeys("ab", ""), {"a": ["a dog"], "b": [""]}).figures
    assert silent["METEOR"] == 0
    assert not any(math.isnan(value) for value in silent.values())


@pytest.mark.interfaces
@needs_java
def test_our_own_tokenizer_goes_with_meteor_too(installed):
    references = {"a": ["a dog's bone"], "b": ["(a cat)"]}
    own = caption_scores({"a": "a dog's bone", "b": "a cat"}, references, tokenizer="python")
    assert own.tokenizer == OWN
    assert own.figures["BLEU-2"] == pytest.approx(100)
    pairs = [["a dog 's bone", "a cat"], [["a dog 's bone"], ["a cat"]]]
    assert own.figures["METEOR"] == pytest.approx(
        100 * meteor_score(JAVA, *pairs, time_limit=None), abs=1e-9
    )
    assert tokenize("(a cat)") == "a cat"
    assert own.row() == {**own.figures, "tokenizer": OWN}
    alone = caption_scores({"a": "x", "b": "y"}, references, tokenizer="ptb", meteor=False)
    assert "METEOR" not in alone.figures
    assert alone.missing == {}
    assert alone.row()["METEOR"] is None


@needs_java
@needs_fork
def test_a_time_limit_ends_the_program(java_runs):
    with pytest.raises(
        TimeoutError, match=r"METEOR 1\.5 .* limit of 0\.1 seconds: raise the limit"
    ):
        # No Java starts and reads all paraphrases so fast.
        meteor_score(JAVA, ["a dog"], [["a cat"]], time_limit=0.1)
    assert java_runs() == []
    with pytest.raises(ValueError, match="expected time_limit above 0 seconds, got nan"):
        caption_scores({"a": "x"}, {"a": ["x"]}, time_limit=math.nan)


def meteor_for_ever(answered):
    """Has METEOR score more than pipes hold, and reads its first answer alone."""

    def line(self, own=JavaProgram.line):
        own(self)
        answered.set()
        while True:
            signal.pause()

    JavaProgram.line = line
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        meteor_score(JAVA, ["a dog"] * 50_000, [["a cat"]] * 50_000, time_limit=None)
    except KeyboardInterrupt:
        os._exit(130)


@needs_java
@needs_fork
@pytest.mark.parametrize("moment", ["start", "work"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_program_outlives_its_process(installed, java_runs, number, moment):
    fork = multiprocessing.get_context("fork")
    answered = fork.Event()
    process = fork.Process(target=meteor_for_ever, args=(answered,))
    process.start()
    wait_until(answered.is_set if moment == "work" else java_runs)
    assert java_runs()
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == (130 if number == signal.SIGINT else -9)
    wait_until(lambda: not java_runs())


@needs_java
@needs_fork
def test_a_failed_program_is_gone_and_says_why(java_runs, tmp_path):
    with JavaProgram(JAVA, ["-jar", "none.jar"], tmp_path, "toy", 600) as program:
        program.feed(["x" * 1_000_000], last=True)
        with pytest.raises(
            JavaMissing, match=r"^toy failed: one of its files is missing.*none\.jar"
        ):
            program.line()
    with (
        pytest.raises(ZeroDivisionError),
        JavaProgram(JAVA, ["-version"], tmp_path, "toy", 600),
    ):
        raise ZeroDivisionError
    assert java_runs() == []


def script(folder, text):
    """A folder with a program that is called java."""
    folder.mkdir(parents=True)
    path = folder / "java"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(folder)


ONE = ({"a": "a dog"}, {"a": ["a dog runs"]})
TOO_OLD = "Exception in thread: java.lang.UnsupportedClassVersionError: Unsupported version 52.0"


@pytest.mark.skipif(os.name != "posix", reason="stands in for java with a shell script")
def test_without_java_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = caption_scores(*ONE)
    assert scores.tokenizer == OWN
    assert list(scores.figures) == [name for name in FIGURES if name != "METEOR"]
    assert scores.missing["METEOR"].startswith("not available: no Java: there is no java on PATH")
    assert scores.row()["METEOR"] is None
    with pytest.raises(JavaMissing, match="no Java: there is no java on PATH"):
        caption_scores(*ONE, tokenizer="ptb")
    broken = script(tmp_path / "broken", "echo Unable to locate a Java Runtime. >&2; exit 1")
    monkeypatch.setenv("PATH", broken)
    text = caption_scores(*ONE).missing["METEOR"]
    assert "broken/java does not run: java -version failed: exit status 1 (Unable to loc" in text
    assert caption_scores(*ONE, tokenizer="python", meteor=False).missing == {}
    with pytest.raises(ValueError, match="expected tokenizer to be auto, ptb or python, got 'PTB'"):
        caption_scores(*ONE, tokenizer="PTB")


@pytest.mark.skipif(os.name != "posix", reason="stands in for java with a shell script")
def test_a_java_that_fails_is_told_in_words(tmp_path, monkeypatch):
    version = '[ "$(eval echo \\${$#})" = -version ] && exit 0; '
    for name, text, kind, wanted in (
        ("old", f"echo '{TOO_OLD}' >&2; exit 1", JavaMissing, "this Java is too old"),
        ("killed", "kill -9 $$", JavaError, "killed by signal 9"),
        ("short", "cat; echo; echo", JavaError, "expected 1 lines from .*, got 3"),
    ):
        monkeypatch.setenv("PATH", script(tmp_path / name, version + text) + ":/bin:/usr/bin")
        with pytest.raises(kind, match=wanted):
            caption_scores(*ONE, tokenizer="ptb", meteor=False)
    silly = version + 'case "$*" in *meteor*) while read -r x; do echo 1,0 2; done;; *) cat;; esac'
    monkeypatch.setenv("PATH", script(tmp_path / "silly", silly) + ":/bin:/usr/bin")
    with pytest.raises(JavaError, match=r"expected 23 numbers from METEOR 1\.5, got '1,0 2'"):
        caption_scores(*ONE)


@needs_java
def test_java_is_also_found_by_java_home(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "java").symlink_to(JAVA)
    monkeypatch.setenv("JAVA_HOME", str(home))
    monkeypatch.setenv("PATH", script(tmp_path / "broken", "exit 1"))
    assert find_java() == str(home / "bin" / "java")


@needs_java
def test_too_little_memory_is_told(installed, monkeypatch):
    monkeypatch.setenv("_JAVA_OPTIONS", "-Xmx8m")
    with pytest.raises(JavaError, match=r"METEOR 1\.5 failed: Java has too little memory"):
        caption_scores(*ONE)
    monkeypatch.setenv("_JAVA_OPTIONS", "-Xms900000g -Xmx900000g")
    assert "does not run" in caption_scores(*ONE).missing["METEOR"]


@pytest.mark.interfaces
@needs_java
def test_a_missing_file_of_pycocoevalcap_is_named(tmp_path, installed):
    jar, paraphrases = installed / "meteor" / "meteor-1.5.jar", installed / "meteor" / "data"
    for path in (jar, paraphrases):
        path.rename(tmp_path / "away")
        try:
            missing = caption_scores(*ONE, tokenizer="python").missing
        finally:
            (tmp_path / "away").rename(path)
        assert missing["METEOR"].startswith(f"not available: {path}")
        assert missing["METEOR"].endswith("is missing: reinstall pycocoevalcap")
