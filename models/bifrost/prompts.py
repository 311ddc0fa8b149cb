"""Prompts as the released code lays them out (arXiv 2508.05954): fixed length, left padding.

A prompt ends where the image begins. Too long captions are cut, after which the tail (the end of
the user's turn, the start of the answer, the start of the image) overwrites the last tokens, so
that cutting never loses it. Letters: B captions, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Generate an image of {caption}"
VISION_START = "<|vision_start|>"
_PLACE = "\u241f"  # stands for the user's text while a chat template is taken apart
# ChatML, the layout of Qwen2.5-VL, for tokenizers without a template of their own.
_HEAD = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)
# Openings that say nothing of the picture. The released list has 19, of which the first three are
# known; the others were chosen for captions written by language models.
CAPTION_OPENINGS = (
    "The image shows",
    "In the image,",
    "The image depicts",
    "The image features",
    "The image displays",
    "The image captures",
    "The image presents",
    "The image is of",
    "The image is",
    "This image shows",
    "This image depicts",
    "This image features",
    "This image is",
    "In this image,",
    "The picture shows",
    "The picture depicts",
    "The photo shows",
    "An image of",
    "A picture of",
)


class PromptTokens(Protocol):
    """A tokenizer's part in a prompt."""

    @property
    def pad_id(self) -> int:
        """Id that stands at padding."""
        ...

    @property
    def tail_ids(self) -> Sequence[int]:
        """Ids behind the caption, with which every prompt ends; may be none."""
        ...

    def prompt_ids(self, caption: str) -> Sequence[int]:
        """Ids of the whole prompt of a caption, tail included; "" is the empty caption."""
        ...


class Prompts(NamedTuple):
    """A batch of prompts.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T) int64, 0 at padding, which is on the left.
    """

    input_ids: Tensor
    attention_mask: Tensor


class ChatTokens:
    """Prompts of a Hugging Face tokenizer by its chat template, else by ChatML.

    Captions are text alone: special tokens written in them are not read as such.

    Args:
        tokenizer: Of the language model.
        instruction: The user's text; "{caption}" is replaced.
        image_start: Token behind the answer's start. None takes "<|vision_start|>" if the
            tokenizer has it, else nothing.

    Raises:
        ValueError: The instruction has no place for the caption, the token is unknown, the
            template does not show the user's text once, or there is no id for padding.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        instruction: str = INSTRUCTION,
        image_start: str | None = None,
    ) -> None:
        if instruction.count("{caption}") != 1:
            raise ValueError(f"instruction={instruction!r}: must contain {{caption}} once")
        known = set(tokenizer.get_vocab())
        if image_start is None:
            image_start = VISION_START if VISION_START in known else ""
        elif image_start and image_start not in known:
            raise ValueError(f"image_start={image_start!r}: the tokenizer has no such token")
        padding = tokenizer.pad_token_id
        padding = tokenizer.eos_token_id if padding is None else padding
        if padding is None:
            raise ValueError("tokenizer: has no token for padding; set its pad_token")
        head, tail = _template_parts(tokenizer)
        self._tokenizer, self._instruction = tokenizer, instruction
        self._pad = int(padding)
        self._head, self._tail = self._ids(head), self._ids(tail + image_start)

    @property
    def pad_id(self) -> int:
        """Id that stands at padding."""
        return self._pad

    @property
    def tail_ids(self) -> Sequence[int]:
        """End of the user's turn, start of the answer, start of the image."""
        return self._tail

    def prompt_ids(self, caption: str) -> Sequence[int]:
        """Ids of the conversation up to the image."""
        said = self._instruction.replace("{caption}", caption)
        return [*self._head, *self._ids(said, plain=True), *self._tail]

    def _ids(self, text: str, plain: bool = False) -> list[int]:
        coded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=plain)
        return list(coded["input_ids"])


def lay_out(captions: Sequence[str], tokens: PromptTokens, length: int) -> Prompts:
    """Prompts of one length.

    Args:
        captions: B texts.
        tokens: Of the language model's tokenizer.
        length: T; the paper's code has 300 for long captions, 60 for class names.

    Raises:
        ValueError: No captions, or no room for anything but the tail.
    """
    tail = list(tokens.tail_ids)
    if not captions or length <= len(tail):
        raise ValueError(
            f"length={length}, {len(captions)} captions: must be at least one caption and more "
            f"than the {len(tail)} tokens of the tail"
        )
    ids = torch.full((len(captions), length), tokens.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, caption in enumerate(captions):
        found = list(tokens.prompt_ids(caption))[:length]
        if len(found) == length:
            found[length - len(tail) :] = tail
        ids[row, length - len(found) :] = torch.tensor(found, dtype=torch.int64)
        mask[row, length - len(found) :] = 1
    return Prompts(ids, mask)


def clean_caption(
    caption: str, openings: Sequence[str] = CAPTION_OPENINGS, lower_rest: bool = False
) -> str:
    """Cut the first opening that matches, and begin what is left with a capital letter.

    Args:
        caption: Of a language model, as a rule.
        openings: Tried in this order.
        lower_rest: Whether the other letters become small, as in the released code, which so
            loses names and acronyms.
    """
    for opening in openings:
        rest = caption.removeprefix(opening)
        if len(rest) < len(caption):
            rest = rest.strip()
            return rest.capitalize() if lower_rest else rest[:1].upper() + rest[1:]
    return caption


def _template_parts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What stands before and behind the user's text, the start of the answer included."""
    if not tokenizer.chat_template:
        return _HEAD
    said = [{"role": "user", "content": _PLACE}]
    text = str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
    parts = text.split(_PLACE)
    if len(parts) != 2:
        raise ValueError(
            f"chat_template: shows the user's text {len(parts) - 1} times; expected once, "
            "use another template"
        )
    return parts[0], parts[1]
