"""Layouts of any-resolution images: which places of the packing are read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.token_reduction.llava_reduction import reduced_llava
from models.token_reduction.packing import NEWLINE, PackedImage, kept_places
from models.token_reduction.selection import Selection, select
from tests.models.tiny_vision_language import Llava, llava_next, llava_onevision, prompt


def test_newlines_of_rows_without_tokens_are_dropped() -> None:
    # Base tile of 2 x 2, then two tiles side by side: rows 4 5 8 9 and 6 7 10 11, unpadded to the
    # inner two columns.
    source = torch.tensor([0, 1, 2, 3, 5, 8, NEWLINE, 7, 10, NEWLINE])
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0], mask[2, 2], mask[1, 0] = True, True, True  # base tile, token 10, token 4 (padding)
    kept = kept_places(source, mask, "keep")
    assert kept.tolist() == [True] * 4 + [False, False, True, False, True, True]
    kept = kept_places(source, mask, "drop")
    assert kept.tolist() == [True] * 4 + [False, False, False, False, True, True]
    single = torch.tensor([0, 1, 2, 3, NEWLINE])
    assert kept_places(single, mask[2:], "drop").tolist() == [False, False, True, False, True]
    image = PackedImage(source, kept, mask, mask.float(), torch.zeros(6, 5))
    assert (image.tokens, image.newlines) == (5, 1)


@pytest.mark.parametrize("make", [llava_next, llava_onevision], ids=["next", "onevision"])
@torch.no_grad()
def test_dropped_newlines_shorten_the_prompt(make: Callable[[], Llava]) -> None:
    model = make()

    def first_rows(tokens: Tensor, grid: tuple[int, int]) -> Selection:
        scores = torch.zeros(tokens.shape[:2])
        scores[:, : grid[1]] = 1  # the top row of every tile
        return select(tokens, scores, threshold=0.5)

    call = prompt(model, 3)
    with reduced_llava(model, first_rows) as handle:
        longer = model(**call).logits
    newlines = handle.images[0].newlines
    with reduced_llava(model, first_rows, newlines="drop") as handle:
        shorter = model(**call).logits
    assert newlines == 12
    assert handle.images[0].newlines == 3  # three rows of tiles
    assert longer.shape[1] - shorter.shape[1] == 9
