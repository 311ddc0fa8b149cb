"""The demo's tokenizer: byte-level byte-pair encoding trained on the demo's captions.

A text is laid out as ``<bos> caption <img>``, padded on the left, so that image tokens follow
``<img>`` at once. Any text can be encoded: entries of single bytes are always there.
Letters: B texts, T tokens.

Example:
    >>> tokenizer = train_tokenizer(["red heart", "black cat"], entries=300)
    >>> ids, mask = tokenizer.encode(["red cat"])
    >>> ids.shape, tokenizer.decode(ids)
    (torch.Size([1, 16]), ['red cat'])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

PAD, BOS, IMAGE = "<pad>", "<bos>", "<img>"
SPECIAL = (PAD, BOS, IMAGE)
LENGTH = 16
_BYTES = 256
_FILE_BYTES = 4_000_000
_REMEDY = "expected one that DemoTokenizer.save wrote"


class TokenBatch(NamedTuple):
    """Texts as numbers.

    Attributes:
        ids: (B, T) int64, left padded.
        mask: (B, T) bool, False at padding.
    """

    ids: Tensor
    mask: Tensor

    def rows(self, index: Tensor) -> TokenBatch:
        """Some of the texts."""
        return TokenBatch(self.ids[index], self.mask[index])


class DemoTokenizer:
    """Encodes captions as ``<bos> caption <img>``.

    Args:
        tokenizer: Of the ``tokenizers`` library, with the three special entries.
        length: T, tokens of every text.

    Raises:
        ValueError: If a special entry is missing or there is no room for a caption.
    """

    def __init__(self, tokenizer: Tokenizer, length: int = LENGTH) -> None:
        vocabulary = tokenizer.get_vocab()
        missing = [name for name in SPECIAL if name not in vocabulary]
        if missing:
            raise ValueError(f"tokenizer: has no entry {missing[0]}; {_REMEDY}")
        if length < 3:
            raise ValueError(f"length={length}: must be >= 3, <bos> and <img> take two tokens")
        self.length = length
        self.pad_id, self.bos_id, self.image_id = (vocabulary[name] for name in SPECIAL)
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        """Entries, special ones included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, captions: Sequence[str], length: int | None = None) -> TokenBatch:
        """Lay out captions; the end of one that is too long is cut, never ``<img>``.

        Args:
            captions: Texts; "" is the empty caption. Special entries in them are plain text.
            length: T, another than the tokenizer's own.
        """
        length = self.length if length is None else length
        ids = torch.full((len(captions), length), self.pad_id)
        for row, caption in zip(ids, captions, strict=True):
            entries = [self.bos_id, *self.caption_ids(caption)[: length - 2], self.image_id]
            row[length - len(entries) :] = torch.tensor(entries)
        return TokenBatch(ids, ids != self.pad_id)

    def caption_ids(self, caption: str) -> list[int]:
        """Entries of a caption, without special ones."""
        # The library would read a special entry's name in a caption as that entry.
        for name in SPECIAL:
            caption = caption.replace(name, f"{name[0]} {name[1:]}")
        return list(self._tokenizer.encode(caption, add_special_tokens=False).ids)

    def decode(self, ids: Tensor) -> list[str]:
        """Captions of tokens (B, T), without special entries."""
        rows: list[list[int]] = ids.tolist()
        texts = [str(self._tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
        return [text.removeprefix(" ") for text in texts]

    def to_json(self) -> str:
        """The tokenizer as text; equal for equal captions."""
        return str(self._tokenizer.to_str(pretty=True))

    def save(self, path: Path) -> None:
        """Write the tokenizer as JSON."""
        path.write_text(self.to_json() + "\n", encoding="utf-8")


def load_tokenizer(path: Path, length: int = LENGTH) -> DemoTokenizer:
    """Read a tokenizer that `DemoTokenizer.save` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, too large or another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer={path}: there is no such file; {_REMEDY}")
    if path.stat().st_size > _FILE_BYTES:
        raise ValueError(f"tokenizer={path}: larger than {_FILE_BYTES} bytes; {_REMEDY}")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        return DemoTokenizer(tokenizer, length)
    except Exception as error:  # the library raises bare Exception for any fault in the text
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"tokenizer={path}: unreadable ({reason}); {_REMEDY}") from None


def train_tokenizer(
    captions: Iterable[str], entries: int = 1024, length: int = LENGTH
) -> DemoTokenizer:
    """Learn merges of bytes from captions; their order does not matter.

    Args:
        captions: Texts of the training set.
        entries: Size of the vocabulary at most: special entries, bytes and merges.
        length: T, tokens of every text.

    Raises:
        ValueError: If there is no room for every byte.
    """
    least = _BYTES + len(SPECIAL)
    if entries < least:
        raise ValueError(f"entries={entries}: must be >= {least}, every byte needs one")
    tokenizer = Tokenizer(models.BPE())
    # A word is the same entry at the start of a caption and inside it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(captions), trainer)
    return DemoTokenizer(tokenizer, length)
