"""Cleans captions and converts them to and from BERT token ids, as BLIP does."""

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
"""The first entries of a small vocabulary, in transformers' order."""

_ADDED = ("[DEC]", "[ENC]")
_BERT = "bert-base-uncased"
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_ADVICE = (
    f"BLIP uses the tokenizer of {_BERT}: pass the hub name of a BLIP model, or a folder with the "
    f"vocab.txt of {_BERT}"
)


def clean_caption(text: str, max_words: int = 30) -> str:
    """Lower-case a caption, drop ``. ! " ( ) * # : ; ~``, and keep at most ``max_words`` words.

    Source: BLIP's caption preprocessing.
    """
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    return " ".join(text.split()[:max_words])


class CaptionTokenizer:
    """Converts captions to ids and back with BERT's tokenizer plus BLIP's [DEC] and [ENC].

    If the tokenizer lacks [DEC] and [ENC], they are appended: in bert-base-uncased as 30522 and
    30523. ``pad``, ``cls``, ``sep``, ``bos`` ([DEC]) and ``enc`` ([ENC]) are ids; ``vocab_size``
    is the number of rows that the word embedding needs. Picklable.

    Args:
        tokenizer: a transformers BertTokenizer.
    """

    def __init__(self, tokenizer: BertTokenizer) -> None:
        words: dict[str, int] = tokenizer.get_vocab()
        if len(words) <= len(SPECIAL_TOKENS) or words.get("[PAD]") != 0:
            raise ValueError(
                "expected a BERT tokenizer with [PAD] at id 0 and words after the special tokens, "
                f"got {len(words)} entries with [PAD] at {words.get('[PAD]')}"
            )
        tokenizer.add_tokens([t for t in _ADDED if t not in words], special_tokens=True)
        words = tokenizer.get_vocab()
        self._tokenizer: Any = tokenizer
        self.vocab_size = max(words.values()) + 1
        self.pad, self.cls, self.sep = words["[PAD]"], words["[CLS]"], words["[SEP]"]
        self.bos, self.enc = words["[DEC]"], words["[ENC]"]

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str]) -> CaptionTokenizer:
        """Load the tokenizer for a model: a directory, a hub name or an original ``.pth`` file.

        A directory holds ``tokenizer.json`` or ``vocab.txt``; an original checkpoint uses
        bert-base-uncased. Raises ValueError if the tokenizer is missing or unreadable.
        """
        original = Path(model).is_file() or Path(model).suffix == ".pth"
        folder = model_folder(_BERT if original else model, _FILES, _ADVICE)
        # Without either file, transformers silently builds a tokenizer with no words.
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
            raise ValueError(f"{model} has neither tokenizer.json nor vocab.txt; {_ADVICE}")
        try:
            return cls(BertTokenizer.from_pretrained(str(folder)))
        except Exception as error:  # a damaged file can raise anything
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{model} has no readable BERT tokenizer ({reason}); {_ADVICE}"
            ) from error

    @classmethod
    def from_captions(cls, captions: Iterable[str]) -> CaptionTokenizer:
        """Build a small tokenizer from the captions' words; it spells other words out by letter.

        The ids do not depend on the order of the captions. Raises ValueError if there are no words.
        """
        blank = BertTokenizer().backend_tokenizer
        words: set[str] = set()
        for caption in captions:
            plain = blank.normalizer.normalize_str(caption)
            words.update(word for word, _ in blank.pre_tokenizer.pre_tokenize_str(plain))
        if not words:
            raise ValueError("expected at least one word in captions, got none")
        characters = set(string.ascii_lowercase + string.digits + string.punctuation)
        characters.update(*words)
        pieces = sorted(characters | words) + [f"##{letter}" for letter in sorted(characters)]
        entries = [*SPECIAL_TOKENS, *(p for p in dict.fromkeys(pieces) if p not in SPECIAL_TOKENS)]
        return cls(BertTokenizer(vocab={entry: i for i, entry in enumerate(entries)}))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files to a directory that `from_pretrained` can read."""
        self._tokenizer.save_pretrained(folder)

    def encode(
        self,
        captions: Sequence[str],
        max_length: int,
        first: Literal["[DEC]", "[ENC]"] | None = None,
        pad_to_max: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return ids and attention mask, int64 [captions, length], length at most ``max_length``.

        Each row is [CLS], the words, [SEP], then padding to the longest row, or to ``max_length``
        with ``pad_to_max``. Truncation keeps [SEP]. ``first`` replaces [CLS]: "[DEC]" for the
        decoder, "[ENC]" for matching. Raises ValueError for a single string, no captions, or
        ``max_length`` below 2.
        """
        if isinstance(captions, str) or not captions:
            raise ValueError(f"expected a non-empty list of captions, got {captions!r}")
        if max_length < 2:
            raise ValueError(
                f"expected max_length of at least 2, for [CLS] and [SEP], got {max_length}"
            )
        starts = {None: self.cls, "[DEC]": self.bos, "[ENC]": self.enc}
        if first not in starts:
            raise ValueError(f"expected first to be '[DEC]', '[ENC]' or None, got {first!r}")
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
        """Decode ids [captions, length]: drop special tokens and join word pieces."""
        captions: list[str] = self._tokenizer.batch_decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=True
        )
        return [caption.strip() for caption in captions]
