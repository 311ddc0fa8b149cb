"""The batch that paired 2D and 3D data gives and joint pre-training takes.

Letters: B items, each a cloud with its photographs; N points of all global views, 2 an item; M
points of all local views, V_l an item; V photographs of the item that has most, at least 1; I
photographs of the whole batch; P patches of a photograph, rows x columns; C channels.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from torch import Tensor


class PairedBatch(TypedDict):
    """Augmented views of clouds, and the photographs that saw their points.

    The rows of all views of a kind are concatenated. Global views come in the order (first item's
    principal view, first item's second view, second item's principal view, ...), local views item
    by item. The photographs come item by item as well: ``image_number`` tells whose they are.

    Attributes:
        global_coord: (N, 3) float32 metres, of the augmented view.
        global_origin_coord: (N, 3) float32 metres, of the same points in the cloud.
        global_colour: (N, 3) float32 in [0, 1]; zeros where dropped or not known.
        global_normal: (N, 3) float32 of length 1; zeros where dropped or not known.
        global_offset: (2 * B,) int64, end of each global view (exclusive).
        local_coord: (M, 3) float32, and so on as for the global views.
        local_origin_coord: (M, 3) float32.
        local_colour: (M, 3) float32.
        local_normal: (M, 3) float32.
        local_offset: (V_l * B,) int64, end of each local view (exclusive).
        correspondence: (N, V, 2) float32, fractional row and column, in patches, at which a
            photograph of its item saw the point; (-1, -1) where it did not.
        image_number: (B,) int64, photographs of each item, 0 .. V.
        image_index: (I,) int64, position of each photograph in ``PairedScenes.image_paths()``.
        image: (I, 3, H, W) float32 in [0, 1], unless stored features are used.
        image_tokens: (I, P, C) float16 in raster order of the patches, if they are.
        index: (B,) int64, position of the item in its split.
    """

    global_coord: Tensor
    global_origin_coord: Tensor
    global_colour: Tensor
    global_normal: Tensor
    global_offset: Tensor
    local_coord: Tensor
    local_origin_coord: Tensor
    local_colour: Tensor
    local_normal: Tensor
    local_offset: Tensor
    correspondence: Tensor
    image_number: Tensor
    image_index: Tensor
    image: NotRequired[Tensor]
    image_tokens: NotRequired[Tensor]
    index: Tensor


class ImageBatch(TypedDict):
    """Photographs alone, as an encoder of all of them needs.

    Attributes:
        image: (I, 3, H, W) float32 in [0, 1].
        image_index: (I,) int64, position in the list of paths that was asked for.
    """

    image: Tensor
    image_index: Tensor
