"""Point Transformer V3 decoder, for decoder probing and full fine-tuning (arXiv 2510.23607).

Module names are those of the released state dicts. Letters in shape comments: n points of a level,
C channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.concerto.block import Block, Neighbourhood
from models.concerto.clouds import batch_numbers
from models.concerto.encoder import EncodedLevel, EncoderShape, initialise
from models.concerto.level_sizes import check_levels
from models.concerto.ordering import invert_order
from models.concerto.patch_attention import Patches
from models.concerto.serialization import CURVES
from models.concerto.submanifold import neighbour_pairs


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder; the defaults are the paper's.

    Attributes:
        channels: Width of each level but the coarsest, finest first.
        heads: Attention heads of each of these levels.
        depths: Blocks of each of these levels.
        patch_size: Points of an attention patch.
        mlp_ratio: Hidden width of the feed-forward networks over the width.
        drop_path: Probability, in the block nearest the coarsest level, that a point skips a
            residual branch in training; it falls linearly to 0 in the last block.
    """

    channels: tuple[int, ...] = (64, 96, 192, 384)
    heads: tuple[int, ...] = (4, 6, 12, 24)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    patch_size: int = 1024
    mlp_ratio: int = 4
    drop_path: float = 0.3

    def __post_init__(self) -> None:
        check_levels(self, "patch_size", "mlp_ratio")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}: must be in [0, 1)")


class GridUnpooling(nn.Module):
    """Add the projected rows of a coarser level to those of a finer one.

    Args:
        in_channels: Of the coarser level.
        skip_channels: Of the finer level.
        out_channels: Of the result.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(in_channels, out_channels), nn.LayerNorm(out_channels))
        self.proj_skip = nn.Sequential(
            nn.Linear(skip_channels, out_channels), nn.LayerNorm(out_channels)
        )

    def forward(self, x: Tensor, skip: Tensor, inverse: Tensor) -> Tensor:
        """Join coarse rows x with finer rows (n, skip), ``inverse`` (n,) into x: (n, out)."""
        return F.gelu(self.proj_skip(skip)) + F.gelu(self.proj(x)).index_select(0, inverse)


class DecoderStage(nn.Module):
    """Unpooling to a level and its blocks.

    Args:
        up: From the coarser level.
        blocks: Of this level.
    """

    def __init__(self, up: GridUnpooling, blocks: list[Block]) -> None:
        super().__init__()
        self.up = up
        for number, block in enumerate(blocks):
            self.add_module(f"block{number}", block)
        self.depth = len(blocks)

    def forward(self, x: Tensor, skip: Tensor, inverse: Tensor, around: Neighbourhood) -> Tensor:
        """Decode coarser rows x to rows (n, C) of this level."""
        x = self.up(x, skip, inverse)
        for number in range(self.depth):
            x = self.get_submodule(f"block{number}")(x, around, number % CURVES)
        return x


class PointDecoder(nn.Module):
    """Decoder from the levels of an encoder back to its finest one.

    Args:
        encoder: Sizes of the encoder.
        shape: Sizes of the decoder, one level fewer than the encoder has.
    """

    def __init__(self, encoder: EncoderShape, shape: DecoderShape) -> None:
        super().__init__()
        count = len(shape.channels)
        if count != encoder.levels - 1:
            raise ValueError(f"channels={shape.channels}: expected {encoder.levels - 1} levels")
        self.shape = shape
        self.dec = nn.Module()
        rates = torch.linspace(0, shape.drop_path, sum(shape.depths), device="cpu").tolist()
        widths = (*shape.channels, encoder.channels[-1])
        for level in reversed(range(count)):
            before = sum(shape.depths[:level])
            blocks = [
                Block(widths[level], shape.heads[level], shape.mlp_ratio, rate)
                for rate in reversed(rates[before : before + shape.depths[level]])
            ]
            up = GridUnpooling(widths[level + 1], encoder.channels[level], widths[level])
            self.dec.add_module(f"dec{level}", DecoderStage(up, blocks))
        self.apply(initialise)

    def forward(self, levels: list[EncodedLevel]) -> Tensor:
        """Decode all levels of an encoder, finest first, to (n of the finest, first width).

        The blocks use the orders of the encoder's levels.
        """
        x = levels[-1].feat
        for number in reversed(range(len(levels) - 1)):
            inverse = levels[number + 1].inverse
            if inverse is None:
                raise ValueError(f"level {number + 1} has no inverse: pass levels finest first")
            stage = self.dec.get_submodule(f"dec{number}")
            around = _neighbourhood(levels[number], self.shape.patch_size)
            x = stage(x, levels[number].feat, inverse, around)
        return x


@torch.no_grad()
def _neighbourhood(level: EncodedLevel, patch_size: int) -> Neighbourhood:
    """Neighbourhood of a level with the orders that it was encoded with."""
    pairs = neighbour_pairs(level.grid_coord, batch_numbers(level.offset))
    patches = Patches(level.offset, patch_size)
    return Neighbourhood(pairs, patches, level.order, invert_order(level.order))
