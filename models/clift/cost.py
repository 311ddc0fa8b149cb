"""Multiply-accumulate operations of rendering one view, as counted in arXiv 2507.08776, table 2."""

from typing import NamedTuple

from models.clift.clift import CliftShape


class RenderMacs(NamedTuple):
    """Multiply-accumulate operations.

    Attributes:
        linear: Of the linear layers; the paper's "GFLOPs" are 1e-9 of these.
        attention: Of the products of queries and keys, and of weights and values.
    """

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.linear + self.attention


def render_macs(shape: CliftShape, image_size: tuple[int, int], tokens: int) -> RenderMacs:
    """Count the operations of one target view, keys and values of the scene tokens included.

    Args:
        shape: Sizes of the network.
        image_size: (height, width) of the view in pixels.
        tokens: Scene tokens that are read.
    """
    pixels = shape.patch_size**2
    queries = (image_size[0] // shape.patch_size) * (image_size[1] // shape.patch_size)
    square = shape.width**2
    own = 4 * square  # self-attention: query, key, value, output
    cross = 2 * square  # cross-attention: query, output
    network = 2 * shape.width * shape.feed_forward
    layer = queries * (own + cross + network) + tokens * 2 * square
    ends = queries * shape.width * (6 * pixels + 12 * len(shape.frequencies) + 3 * pixels)
    attention = 2 * shape.width * queries * (queries + tokens)
    depth = shape.decoder_layers
    return RenderMacs(depth * layer + ends, depth * attention)
