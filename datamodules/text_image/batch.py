"""The batches that the text-image data gives and text-to-image methods take."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from torch import Tensor


class TextImageBatch(TypedDict):
    """Images with their captions.

    Attributes:
        image: (B, 3, H, W) float32 in [-1, 1], RGB, one square crop; level v maps to
            2 * v / 255 - 1. Other resolutions are made of this same crop. Left out if the data
            module was told not to decode images.
        caption: B captions, of which some are "" in training (caption dropout).
        caption_full: B captions as they are in the data.
        index: (B,) int64, position of the pair in its split.
        key: B names of the pairs, unique within a file of the data.
        category: (B,) int64, position in the data module's ``category_names``, -1 if unknown.
        features: stored tensors (B, ...) by name; only if the data module was given a folder of
            features.
    """

    image: NotRequired[Tensor]
    caption: list[str]
    caption_full: list[str]
    index: Tensor
    key: list[str]
    category: Tensor
    features: NotRequired[dict[str, Tensor]]


class PromptBatch(TypedDict):
    """Captions to draw pictures of.

    Attributes:
        caption: B prompts.
        name: B names for the pictures' files, unique among all prompts.
        metadata: B JSON objects as text; each has the key "prompt", and what else came with it.
        index: (B,) int64, position of the prompt.
    """

    caption: list[str]
    name: list[str]
    metadata: list[str]
    index: Tensor
