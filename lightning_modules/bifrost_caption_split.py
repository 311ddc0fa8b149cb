"""Which captions the demo's base FLUX is taught, a fixed choice that anyone can repeat.

A small FLUX that has seen every caption draws the training pictures from text alone, and what a
ControlNet adds can no longer be told. So a share of the captions is withheld from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def taught_captions(captions: Sequence[str], share: float) -> Tensor:
    """Mask (M,) bool of the captions taught, by the hash of each text alone.

    A larger share contains a smaller one.

    Args:
        captions: M texts.
        share: Expected share taught, 0 .. 1.
    """
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in captions]
    places = [int.from_bytes(digest, "big") / 2**64 for digest in digests]
    return torch.tensor([place < share for place in places], dtype=torch.bool)
