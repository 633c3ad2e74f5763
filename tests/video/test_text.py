"""The tokenizer of captions against ids worked out by hand, and what it says of wrong folders."""

import pickle

import pytest
import torch
from transformers import BertTokenizer

from tokenmix_ops.video.text import SPECIAL_TOKENS, CaptionTokenizer, clean_caption

pytestmark = pytest.mark.interfaces

CAPTIONS = ["a red square moves left", "the circle's edge, turning", "a red circle"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a vocab.txt in the layout and of the size of bert-base-uncased."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["a", "man", "runs", "play", "##ing", ",", "."]
    words += [f"word{i}" for i in range(30522 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    return folder


def test_bert_gets_the_ids_of_blip(bert):
    tokenizer = CaptionTokenizer.from_pretrained(bert)
    assert (tokenizer.pad, tokenizer.cls, tokenizer.sep) == (0, 101, 102)
    assert (tokenizer.bos, tokenizer.enc, tokenizer.vocab_size) == (30522, 30523, 30524)


def test_captions_become_ids_and_captions_again(bert):
    tokenizer = CaptionTokenizer.from_pretrained(str(bert))
    ids, mask = tokenizer.encode(["A man runs", "a zebra, playing"], 40, first="[DEC]")
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [
        [30522, 104, 105, 106, 102, 0, 0],
        [30522, 104, 100, 109, 107, 108, 102],
    ]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]
    assert tokenizer.decode(ids) == ["a man runs", "a, playing"]
    assert tokenizer.decode(ids.tolist()) == tokenizer.decode(ids)


def test_long_captions_keep_their_end_and_short_ones_are_padded(bert):
    tokenizer = CaptionTokenizer.from_pretrained(bert)
    ids, mask = tokenizer.encode(["a man runs a man", ""], 4)
    assert ids.tolist() == [[101, 104, 105, 102], [101, 102, 0, 0]]
    ids, mask = tokenizer.encode(["a man"], 6, first="[ENC]", pad_to_max=True)
    assert ids.tolist() == [[30523, 104, 105, 102, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0]]


def test_a_folder_as_blip_publishes_it_is_read(bert, tmp_path):
    BertTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    tokenizer = CaptionTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos, tokenizer.enc, tokenizer.vocab_size) == (30522, 30523, 30524)


def test_a_saved_or_pickled_tokenizer_is_the_same(tmp_path):
    tokenizer = CaptionTokenizer.from_captions(CAPTIONS)
    tokenizer.save(tmp_path / "new")
    for other in (
        CaptionTokenizer.from_pretrained(tmp_path / "new"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert (other.bos, other.enc, other.sep) == (tokenizer.bos, tokenizer.enc, tokenizer.sep)
        assert other.vocab_size == tokenizer.vocab_size
        assert torch.equal(other.encode(CAPTIONS, 12)[0], tokenizer.encode(CAPTIONS, 12)[0])


def test_a_small_vocabulary_knows_everything_it_is_asked():
    tokenizer = CaptionTokenizer.from_captions(CAPTIONS)
    assert (tokenizer.pad, tokenizer.sep) == (0, SPECIAL_TOKENS.index("[SEP]"))
    assert (tokenizer.bos, tokenizer.enc) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    ids, mask = tokenizer.encode([CAPTIONS[0], "A zebra's 3 hats: naïve!"], 40)
    assert int(mask[0].sum()) == 2 + 5
    assert not (ids == SPECIAL_TOKENS.index("[UNK]")).any()
    assert int(ids.max()) < tokenizer.bos
    assert tokenizer.decode(ids) == [CAPTIONS[0], "a zebra's 3 hats : naive!"]


def test_a_small_vocabulary_does_not_depend_on_the_order():
    first = CaptionTokenizer.from_captions(CAPTIONS)
    second = CaptionTokenizer.from_captions(iter(CAPTIONS[::-1] * 2))
    assert torch.equal(first.encode(CAPTIONS, 12)[0], second.encode(CAPTIONS, 12)[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Man, (running): fast!\n", "a man, running fast"),
        ('  two   "dogs"; #1 ~ * end.  ', "two dogs 1 end"),
        ("it's a well-known cat?", "it's a well-known cat?"),
        ("one.two", "one two"),
        (" \n", ""),
        ("w " * 31, ("w " * 30).strip()),
    ],
)
def test_captions_are_cleaned(text, expected):
    assert clean_caption(text) == expected


def test_captions_are_cut_where_asked():
    assert clean_caption("a b c d", max_words=2) == "a b"


WRONG = {
    "one string": (("a man", 8), {}, "expected a non-empty list of captions, got 'a man'"),
    "none": (([], 8), {}, "expected a non-empty list of captions, got []"),
    "length": ((["a"], 1), {}, "expected max_length of at least 2, for [CLS] and [SEP], got 1"),
    "first": (
        (["a"], 8, "[CLS]"),
        {},
        "expected first to be '[DEC]', '[ENC]' or None, got '[CLS]'",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong):
    arguments, options, message = WRONG[wrong]
    with pytest.raises(ValueError) as error:
        CaptionTokenizer.from_captions(CAPTIONS).encode(*arguments, **options)
    assert str(error.value) == message


def test_captions_without_words_are_refused():
    with pytest.raises(ValueError, match=r"^expected at least one word in captions, got none$"):
        CaptionTokenizer.from_captions(["", " \n"])


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"has neither tokenizer\.json nor vocab\.txt; .*vocab\.txt"
    ):
        CaptionTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"model": 3}', "[]"])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError) as error:
        CaptionTokenizer.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{tmp_path} has no readable BERT tokenizer (")


@pytest.mark.parametrize("words", [["a", "man", "[PAD]", "[CLS]", "b", "c"], ["<s>"], []])
def test_another_vocabulary_is_named(words, tmp_path):
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    with pytest.raises(ValueError, match=r"expected a BERT tokenizer with \[PAD\] at id 0"):
        CaptionTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("model", ["bert-base-uncased", "somewhere/model.pth", "no/such/folder"])
def test_what_is_not_found_says_what_to_do(model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"folder with the vocab\.txt of bert-base-uncased$"):
        CaptionTokenizer.from_pretrained(model)
