"""Which tokens of an any-resolution image reach the language model, and where they stand there.

LLaVA-NeXT and LLaVA-OneVision cut an image into a base tile and further tiles. The further tiles
are laid out as one map, the map loses its padding, each of its rows gets an ``image_newline`` token
and everything follows the base tile. The model's own packing is run on the numbers of the tokens
instead of their features; what comes out is the layout.

Letters: T tiles of an image, L tokens of a tile, N packed tokens, D channels.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

NEWLINE = -1
Newlines = Literal["keep", "drop"]


class PackedImage(NamedTuple):
    """One image as the language model reads it.

    Attributes:
        source: (N,) int64 the token (tile * L + place) at each place of the full packing;
            ``NEWLINE`` for the newline token.
        keep: (N,) bool, places that the language model reads.
        mask: (T, L) bool, tokens that were selected, among them those in the image's padding.
        scores: (T, L) float32 scores that the selection was made with.
        features: (places read, D) projected tokens in the order of the packing.
    """

    source: Tensor
    keep: Tensor
    mask: Tensor
    scores: Tensor
    features: Tensor

    @property
    def tokens(self) -> int:
        """Image tokens that the language model reads, newlines not counted."""
        return int((self.keep & (self.source != NEWLINE)).sum())

    @property
    def newlines(self) -> int:
        """Newline tokens that the language model reads."""
        return int((self.keep & (self.source == NEWLINE)).sum())


def kept_places(source: Tensor, mask: Tensor, newlines: Newlines) -> Tensor:
    """Places of the packing that are read.

    Args:
        source: (N,) layout of the image, see ``PackedImage``.
        mask: (T, L) bool selection.
        newlines: "keep" keeps all newline tokens, "drop" those of rows that keep no token. The
            rows are those of the map; the base tile has none, except where it is the only tile.

    Returns:
        (N,) bool.
    """
    is_newline = source == NEWLINE
    keep = mask.flatten()[source.clamp(min=0)] & ~is_newline
    if newlines == "keep":
        return keep | is_newline
    in_row = keep if len(mask) == 1 else keep & (source >= mask.shape[1])
    row = is_newline.cumsum(0) - is_newline.long()  # newlines before each place
    filled = torch.zeros(len(source) + 1, dtype=torch.long, device=source.device)
    filled = filled.index_add(0, row, in_row.long())  # tokens kept in each row
    return keep | (is_newline & (filled[row] > 0))
