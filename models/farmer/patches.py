"""Space-to-depth patching: images to tokens and back, without loss."""

import torch.nn.functional as F
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, C, H, W) into raster-ordered tokens (B, N, C*p*p).

    Channels of a token run channel-major (C, row, column), so that they match the layout of
    `torch.nn.functional.unfold`.
    """
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)  # (B, N, C*p*p)


def unpatchify(tokens: Tensor, patch_size: int, image_size: int) -> Tensor:
    """Invert `patchify` for square images: (B, N, C*p*p) to (B, C, image_size, image_size)."""
    side = image_size // patch_size
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)  # (B, C*p*p, side, side)
    return F.pixel_shuffle(grid, patch_size)
