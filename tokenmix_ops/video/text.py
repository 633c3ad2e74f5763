"""Captions as BLIP reads and writes them: cleaned, and as ids of BERT's tokenizer."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import BertTokenizer

from tokenmix_ops.video.hub import model_folder

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The first words of a small vocabulary, in transformers' order."""

_ADDED = ("[DEC]", "[ENC]")
_BERT = "bert-base-uncased"
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_ADVICE = (
    f"BLIP reads captions with the tokenizer of {_BERT}: give the hub name of a BLIP model, or a "
    f"folder that holds the vocab.txt of {_BERT}"
)


def clean_caption(text: str, max_words: int = 30) -> str:
    """A caption in lower case without ``. ! " ( ) * # : ; ~``, of at most ``max_words`` words.

    Source: BLIP's preparation of captions.
    """
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    return " ".join(text.split()[:max_words])


class CaptionTokenizer:
    """Turns captions into ids and back with BERT's tokenizer and BLIP's tokens [DEC] and [ENC].

    Of bert-base-uncased, [DEC] is 30522 and [ENC] 30523; a tokenizer that lacks them gets them
    after its last word. ``pad``, ``cls``, ``sep``, ``bos`` ([DEC]) and ``enc`` ([ENC]) are ids;
    ``vocab_size`` is the number of rows that the word embedding must have. Can be pickled.

    Args:
        tokenizer: a transformers BertTokenizer.
    """

    def __init__(self, tokenizer: BertTokenizer) -> None:
        words: dict[str, int] = tokenizer.get_vocab()
        if len(words) <= len(SPECIAL_TOKENS) or words.get("[PAD]") != 0:
            raise ValueError(
                "tokenizer must be a BERT tokenizer, with [PAD] as its first word and words after "
                f"its special ones, got {len(words)} words with [PAD] as {words.get('[PAD]')}"
            )
        tokenizer.add_tokens([t for t in _ADDED if t not in words], special_tokens=True)
        words = tokenizer.get_vocab()
        self._tokenizer: Any = tokenizer
        self.vocab_size = max(words.values()) + 1
        self.pad, self.cls, self.sep = words["[PAD]"], words["[CLS]"], words["[SEP]"]
        self.bos, self.enc = words["[DEC]"], words["[ENC]"]

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str]) -> CaptionTokenizer:
        """The tokenizer of a model: a directory, a hub name, or that of an original ``.pth`` file.

        A directory holds ``tokenizer.json`` or ``vocab.txt``; an original checkpoint goes with
        bert-base-uncased. Raises ValueError if there is none, or if it cannot be read.
        """
        original = Path(model).is_file() or Path(model).suffix == ".pth"
        folder = model_folder(_BERT if original else model, _FILES, _ADVICE)
        # Without either file transformers makes a tokenizer that knows no words.
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
            raise ValueError(f"{model} has no tokenizer.json and no vocab.txt; {_ADVICE}")
        try:
            return cls(BertTokenizer.from_pretrained(str(folder)))
        except Exception as error:  # whatever a damaged file leads to
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{model} has no readable BERT tokenizer, {reason}; {_ADVICE}"
            ) from error

    @classmethod
    def from_captions(cls, captions: Iterable[str]) -> CaptionTokenizer:
        """A small tokenizer of the captions' words; other words are spelt letter by letter.

        The same captions, in any order, give the same ids. Raises ValueError for no words.
        """
        blank = BertTokenizer().backend_tokenizer
        words: set[str] = set()
        for caption in captions:
            plain = blank.normalizer.normalize_str(caption)
            words.update(word for word, _ in blank.pre_tokenizer.pre_tokenize_str(plain))
        if not words:
            raise ValueError("captions must hold at least one word, got none")
        characters = set(string.ascii_lowercase + string.digits + string.punctuation)
        characters.update(*words)
        pieces = sorted(characters | words) + [f"##{letter}" for letter in sorted(characters)]
        entries = [*SPECIAL_TOKENS, *(p for p in dict.fromkeys(pieces) if p not in SPECIAL_TOKENS)]
        return cls(BertTokenizer(vocab={entry: i for i, entry in enumerate(entries)}))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer's files into a directory, as `from_pretrained` reads them."""
        self._tokenizer.save_pretrained(folder)

    def encode(
        self,
        captions: Sequence[str],
        max_length: int,
        first: Literal["[DEC]", "[ENC]"] | None = None,
        pad_to_max: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, int64 [captions, length], with length at most ``max_length``.

        Every row is [CLS], the words, [SEP], then padding up to the longest row, or up to
        ``max_length``; what is too long loses its last words, never [SEP]. ``first`` takes the
        place of [CLS]: "[DEC]" for the decoder, "[ENC]" for matching. Raises ValueError for a
        single string, no captions, or a max_length below 2.
        """
        if isinstance(captions, str) or not captions:
            raise ValueError(f"captions must be a list of one or more, got {captions!r}")
        if max_length < 2:
            raise ValueError(
                f"max_length must be at least 2, for [CLS] and [SEP], got {max_length}"
            )
        starts = {None: self.cls, "[DEC]": self.bos, "[ENC]": self.enc}
        if first not in starts:
            raise ValueError(f"first must be '[DEC]', '[ENC]' or None, got {first!r}")
        encoded = self._tokenizer(
            list(captions),
            padding="max_length" if pad_to_max else "longest",
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        encoded.input_ids[:, 0] = starts[first]
        return encoded.input_ids, encoded.attention_mask

    def decode(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Captions of ids [captions, length]: without special tokens, word pieces joined."""
        captions: list[str] = self._tokenizer.batch_decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=True
        )
        return [caption.strip() for caption in captions]
