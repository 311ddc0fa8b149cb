"""Prompts from a text file, a jsonl file or a folder of text files, as batches.

A text file has one prompt in every line that is not empty. A jsonl file has an object with the key
prompt in every line, as GenEval's evaluation_metadata.jsonl. A folder has one prompt in every .txt
file, whose name the picture will have, as DPG-Bench.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from datamodules.errors import DataError, SampleError
from datamodules.text_image.batch import PromptBatch
from datamodules.text_image.pair_reader import PairReader, decode_text, parse_json

_MAX_FILE_BYTES = 2**26


class Prompt(NamedTuple):
    """A caption to draw, the name of its picture, and a JSON object with all that is known."""

    caption: str
    name: str
    metadata: str


class Prompts(Dataset[PromptBatch]):
    """Batches of prompts in order.

    Args:
        prompts: all of them.
    """

    def __init__(self, prompts: list[Prompt]) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self._prompts)

    def __getitem__(self, pair: tuple[int, int]) -> PromptBatch:
        """A batch of one prompt, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> PromptBatch:
        """The batch of the prompts given as (index, epoch) pairs; the epoch is of no account."""
        chosen = [self._prompts[index] for index, _ in pairs]
        return {
            "caption": [prompt.caption for prompt in chosen],
            "name": [prompt.name for prompt in chosen],
            "metadata": [prompt.metadata for prompt in chosen],
            "index": torch.tensor([index for index, _ in pairs], dtype=torch.int64),
        }


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts at a path.

    Args:
        path: text file, jsonl file or folder of .txt files.

    Raises:
        DataError: one line naming the file and line that cannot be used.
    """
    if path.is_dir():
        prompts = _read_folder(path)
    elif path.suffix == ".jsonl":
        prompts = _read_json_lines(path)
    else:
        lines = decode_text(_read(path), str(path)).split("\n")
        captions = [line.removesuffix("\r") for line in lines if line.strip()]
        prompts = [_numbered(number, caption) for number, caption in enumerate(captions)]
    if not prompts:
        raise DataError(
            f"{path}: no prompts; expected a text file with one prompt in each line, a jsonl file "
            "with the key prompt, or a folder of .txt files (data.init_args.prompts)"
        )
    return prompts


def captions_of(reader: PairReader, positions: list[int], *, skip: bool) -> list[Prompt]:
    """Captions of pairs as prompts.

    Args:
        reader: where the pairs are.
        positions: those wanted.
        skip: leave out pairs without a usable caption.

    Raises:
        SampleError: if a pair has no usable caption, unless it may be left out.
    """
    captions = []
    for position in positions:
        try:
            captions.append(reader.caption(position))
        except SampleError:
            if not skip:
                raise
    return [_numbered(number, caption) for number, caption in enumerate(captions)]


def _numbered(number: int, caption: str) -> Prompt:
    return Prompt(caption, f"{number:05d}", json.dumps({"prompt": caption}, ensure_ascii=False))


def _read(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > _MAX_FILE_BYTES:
            raise DataError(f"{path}: {size} bytes, at most {_MAX_FILE_BYTES} allowed")
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); correct data.init_args.prompts"
        ) from error


def _read_json_lines(path: Path) -> list[Prompt]:
    prompts: list[Prompt] = []
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:line {number}"
        value = parse_json(line, place)
        caption = value.get("prompt") if isinstance(value, dict) else None
        if not isinstance(caption, str):
            raise DataError(f'{place}: expected an object with "prompt": "..."')
        metadata = json.dumps(value, ensure_ascii=False)
        prompts.append(Prompt(caption, f"{len(prompts):05d}", metadata))
    return prompts


def _read_folder(folder: Path) -> list[Prompt]:
    prompts = []
    for file in sorted(folder.glob("*.txt")):
        if not file.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{file}: leads out of {folder}; copy the file into the folder")
        caption = decode_text(_read(file), str(file)).rstrip("\r\n")
        metadata = json.dumps({"prompt": caption}, ensure_ascii=False)
        prompts.append(Prompt(caption, file.stem, metadata))
    return prompts
