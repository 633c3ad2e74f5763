"""Ranks against sorting by hand; captions against figures worked out on paper."""

import math
import statistics
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmix_ops.video.metrics.captions import caption_scores, tokenize
from tokenmix_ops.video.metrics.recall import retrieval_scores


def test_ranks_worked_out_by_hand():
    similarity = torch.tensor(
        [
            [0.9, 0.1, 0.2],  # text of video 0: rank 1
            [0.5, 0.4, 0.3],  # of video 1: 2
            [0.2, 0.8, 0.1],  # of video 1: 1
            [0.7, 0.6, 0.6],  # of video 2: 3, for video 1 ties with it
        ]
    )
    scores = retrieval_scores(similarity, torch.tensor([0, 1, 1, 2]))
    assert scores["t2v R@1"] == 50
    assert scores["t2v R@5"] == scores["t2v R@10"] == 100
    assert scores["t2v MedR"] == 1.5
    assert scores["t2v MeanR"] == 7 / 4
    assert scores["v2t R@1"] == 100
    assert scores["v2t MedR"] == scores["v2t MeanR"] == 1
    assert scores["rsum"] == 550


def test_a_model_that_cannot_tell_gains_nothing_by_it():
    scores = retrieval_scores(torch.zeros(20, 20), torch.arange(20))
    assert scores["rsum"] == 0
    assert scores["t2v MedR"] == scores["v2t MedR"] == 20
    # Five texts of one video that tie with each other, but with no other video's.
    similarity = torch.full((15, 3), -1.0)
    rows = torch.arange(3).repeat_interleave(5)
    similarity[torch.arange(15), rows] = 1.0
    assert retrieval_scores(similarity, rows)["rsum"] == 600


@given(st.data())
def test_ranks_agree_with_counting(data):
    num_texts = data.draw(st.integers(1, 12))
    num_videos = data.draw(st.integers(1, 12))
    rows = data.draw(
        st.lists(st.integers(0, num_videos - 1), min_size=num_texts, max_size=num_texts)
    )
    # Few values, so that ties are many; -inf is what is not ranked again.
    value = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0])
    table = [data.draw(st.lists(value, min_size=num_videos, max_size=num_videos)) for _ in rows]
    to_video = [
        1 + sum(v != row and table[t][v] >= table[t][row] for v in range(num_videos))
        for t, row in enumerate(rows)
    ]
    to_text = [
        min(
            1 + sum(o != v and table[u][v] >= table[t][v] for u, o in enumerate(rows))
            for t, row in enumerate(rows)
            if row == v
        )
        for v in sorted(set(rows))
    ]
    scores = retrieval_scores(torch.tensor(table), torch.tensor(rows))
    total = 0.0
    for name, ranks in (("t2v", to_video), ("v2t", to_text)):
        for k in (1, 5, 10):
            recall = 100 * sum(rank <= k for rank in ranks) / len(ranks)
            assert scores[f"{name} R@{k}"] == pytest.approx(recall)
            total += recall
        assert scores[f"{name} MedR"] == statistics.median(ranks)
        assert scores[f"{name} MeanR"] == pytest.approx(statistics.mean(ranks))
    assert scores["rsum"] == pytest.approx(total)
    assert len(scores) == 11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_any_number_type_ranks_alike(dtype):
    similarity = torch.randint(-9, 9, (30, 10), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(30) % 10
    wanted = retrieval_scores(similarity.float().requires_grad_(), rows)
    assert retrieval_scores(similarity.to(dtype), rows) == wanted


@pytest.mark.parametrize(
    ("similarity", "rows", "text"),
    [
        (
            torch.zeros(3),
            torch.zeros(3).long(),
            r"expected similarity \[num_texts, num_videos\], .*, got \[3\]",
        ),
        (torch.zeros(0, 4), torch.zeros(0).long(), "each at least 1, got .0, 4."),
        (
            torch.zeros(2, 2),
            torch.zeros(3).long(),
            r"text_videos to be torch.int64 \[2\].* got torch.int64 \[3\]",
        ),
        (torch.zeros(2, 2), torch.zeros(2), r"got torch.float32 \[2\]"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "text_videos from 0 to 1, .*, got 0 to 2"),
        (torch.zeros(2, 2), torch.tensor([-1, 0]), "got -1 to 0"),
        (torch.tensor([[0, math.nan], [0, 0]]), torch.zeros(2).long(), "NaN in 1 of its 2 rows"),
    ],
)
def test_similarities_that_cannot_be_ranked_are_refused(similarity, rows, text):
    with pytest.raises(ValueError, match=text):
        retrieval_scores(similarity, rows)


# As Stanford's PTBTokenizer and the COCO evaluation leave them.
TOKENS = {
    "A man is Playing a guitar.": "a man is playing a guitar",
    "a man's dog doesn't bark, can't run": "a man 's dog does n't bark ca n't run",
    "I'm you're we've she'd they'll it’s": "i 'm you 're we 've she 'd they 'll it 's",
    'he said "hi" - it\'s 10:30!': "he said hi it 's 10:30",
    "dogs' tails; they cannot... (really?)": "dogs tails they can not really",
    "black-and-white o'clock": "black-and-white o'clock",
    "3.5 of 10,000 people": "3.5 of 10,000 people",
    "#8 & $5 50%": "# 8 & $ 5 50 %",
    "a football/soccer game": "a football/soccer game",
    "tabs\tand\nlines  here": "tabs and lines here",
    "“quoted” ‘too’ — fine…": "quoted too fine",
    "...": "",
    "": "",
    "Ein Café 犬": "ein café 犬",
}


@pytest.mark.parametrize("caption", TOKENS)
def test_tokens(caption):
    assert tokenize(caption) == TOKENS[caption]


@given(st.text())
def test_any_text_has_tokens_that_a_scorer_can_split(caption):
    tokens = tokenize(caption)
    assert tokens.split(" ") == (tokens.split() or [""])
    assert tokens.lower() == tokens.lower().strip()


def scored(predictions, references):
    pytest.importorskip("pycocoevalcap")
    return caption_scores(predictions, references, tokenizer="python", meteor=False).figures


@pytest.mark.interfaces
def test_captions_worked_out_on_paper(capsys):
    predictions = {"a": "The cat sat.", "b": "a red dog runs fast"}
    references = {"a": ["the cat sat down"], "b": ["a red dog runs fast"]}
    scores = scored(predictions, references)
    # Eight words for nine: all right, but brief. One caption of three words has no four-gram.
    brevity = math.exp(1 - 9 / 8)
    for n in range(1, 5):
        assert scores[f"BLEU-{n}"] == pytest.approx(100 * brevity, rel=1e-6)
    # Precision 1 and recall 3/4 with beta 1.2, and a perfect one.
    first = (1 + 1.2**2) * 0.75 / (0.75 + 1.2**2)
    assert scores["ROUGE-L"] == pytest.approx(100 * (first + 1) / 2)
    # Each n-gram is in one of two ids only, so weighs log 2 alike: cosine sqrt(m / M) for m of M
    # n-grams, times a Gaussian of width 6 of the bigrams missing; ten times the mean over n.
    cosines = [math.sqrt(3 / 4), math.sqrt(2 / 3), math.sqrt(1 / 2), 0.0]
    first = 10 * statistics.mean(cosines) * math.exp(-1 / 72)
    assert scores["CIDEr"] == pytest.approx(100 * (first + 10) / 2)
    assert list(scores) == [*(f"BLEU-{n}" for n in range(1, 5)), "ROUGE-L", "CIDEr"]
    assert all(type(value) is float for value in scores.values())
    assert capsys.readouterr().out == ""


def test_extremes():
    references = {"a": ["a red circle moves left"], "b": ["the blue square goes up today"]}
    perfect = scored({"b": "The blue square goes up today!", "a": references["a"][0]}, references)
    assert all(perfect[f"BLEU-{n}"] == pytest.approx(100) for n in range(1, 5))
    assert perfect["ROUGE-L"] == pytest.approx(100)
    assert perfect["CIDEr"] == pytest.approx(1000)
    for silent in ("", "...", "entirely other words"):
        nothing = scored(dict.fromkeys("ab", silent), references)
        assert all(0 <= value < 1e-3 for value in nothing.values())


def test_the_best_of_several_references_counts():
    references = {"a": ["a dog runs over there", "a cat sleeps"], "b": ("birds fly",)}
    scores = scored({"a": "a cat sleeps", "b": "birds fly"}, references)
    assert scores["ROUGE-L"] == pytest.approx(100)
    assert scores["BLEU-1"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("predictions", "references", "text"),
    [
        ({"a": "x"}, {"a": ["x"], "b": ["y"]}, "predictions lack 1: 'b'"),
        ({"a": "x", "7": "y"}, {"a": ["x"]}, "references lack 1: '7'"),
        ({}, {str(i): ["x"] for i in range(9)}, r"lack 9: '0', '1', '2', '3', '4', \.\.\.$"),
        ({}, {}, "expected at least one prediction, got none"),
        ({"a": "x"}, {"a": []}, r"references for 'a' must be a non-empty list of captions"),
        ({"a": "x"}, {"a": "x"}, r"references for 'a' must be a non-empty list .* got 'x'"),
        ({"a": "x"}, {"a": ["..."]}, "expected at least one word in references, got none"),
    ],
)
def test_captions_that_cannot_be_scored_are_refused(predictions, references, text):
    with pytest.raises(ValueError, match=text):
        scored(predictions, references)


def test_a_missing_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tokenmix_ops\[metrics\]'"):
        caption_scores({"a": "x"}, {"a": ["x"]})
