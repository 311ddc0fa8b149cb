"""Point Transformer V3 encoder in the variant of Sonata and Concerto (arXiv 2510.23607).

Module names are those of the released state dicts. Letters in shape comments: N points, B clouds,
C channels, n points of a level.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from models.concerto.block import Block, Neighbourhood, find_neighbourhood
from models.concerto.clouds import PointCloud, batch_numbers
from models.concerto.embedding import Embedding
from models.concerto.level_sizes import check_levels
from models.concerto.pooling import GridPooling, cell_means, group_cells
from models.concerto.serialization import CURVES

_COLOUR = slice(3, 6)


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of an encoder; the defaults are the paper's base model.

    Attributes:
        in_channels: Input features; 9 are coordinates, colour and normal.
        channels: Width of each level, finest first.
        heads: Attention heads of each level.
        depths: Blocks of each level.
        patch_size: Points of an attention patch.
        mlp_ratio: Hidden width of the feed-forward networks over the width.
        drop_path: Probability, in the last block, that a point skips a residual branch in
            training; it grows linearly from 0 in the first.
        colour_centre: Subtracted from features 3 to 5; 0 in the paper.
        colour_scale: Factor of features 3 to 5 after that; 1 in the paper.
    """

    in_channels: int = 9
    channels: tuple[int, ...] = (48, 96, 192, 384, 512)
    heads: tuple[int, ...] = (3, 6, 12, 24, 32)
    depths: tuple[int, ...] = (3, 3, 3, 12, 3)
    patch_size: int = 1024
    mlp_ratio: int = 4
    drop_path: float = 0.3
    colour_centre: float = 0.0
    colour_scale: float = 1.0

    def __post_init__(self) -> None:
        check_levels(self, "in_channels", "patch_size", "mlp_ratio")
        if self.colour_scale == 0:
            raise ValueError("colour_scale=0.0: must not be 0, which would hide all colours")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}: must be in [0, 1)")

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.channels)

    def up_cast_channels(self, count: int) -> int:
        """Width of features after ``count`` up-casts."""
        return sum(self.channels[self.levels - 1 - count :])

    @classmethod
    def tiny(cls) -> "EncoderShape":
        """T, 4.9 million parameters."""
        return cls(channels=(16, 32, 64, 128, 256), heads=(1, 2, 4, 8, 16), depths=(1, 1, 1, 3, 1))

    @classmethod
    def small(cls) -> "EncoderShape":
        """S, 38.6 million parameters."""
        return cls(
            channels=(32, 64, 128, 256, 512), heads=(2, 4, 8, 16, 32), depths=(2, 2, 2, 6, 2)
        )

    @classmethod
    def base(cls) -> "EncoderShape":
        """B, 108.5 million parameters."""
        return cls()

    @classmethod
    def large(cls) -> "EncoderShape":
        """L, 207.7 million parameters."""
        return cls(channels=(64, 128, 256, 512, 768), heads=(4, 8, 16, 32, 48))


class EncodedLevel(NamedTuple):
    """Points of one level of an encoded batch.

    Attributes:
        feat: (n, C).
        coord: (n, 3) metres, means of the finer level's.
        origin_coord: (n, 3) likewise, or None.
        grid_coord: (n, 3) int64 voxels, twice as large as the finer level's.
        offset: (B,) int64 cumulative numbers of points.
        inverse: (n of the finer level,) int64 row here of each row there; None at the finest.
        order: (4, n) int64 row at each place of the four curves, shuffled as asked for.
    """

    feat: Tensor
    coord: Tensor
    origin_coord: Tensor | None
    grid_coord: Tensor
    offset: Tensor
    inverse: Tensor | None
    order: Tensor


class Stage(nn.Module):
    """Pooling, except at the finest level, and the blocks of one level.

    Args:
        shape: Of the encoder.
        level: Number of the level, 0 the finest.
        drop_path: One probability per block of this level.
    """

    def __init__(self, shape: EncoderShape, level: int, drop_path: list[float]) -> None:
        super().__init__()
        width, heads = shape.channels[level], shape.heads[level]
        self.down = GridPooling(shape.channels[level - 1], width) if level else None
        for number, probability in enumerate(drop_path):
            self.add_module(f"block{number}", Block(width, heads, shape.mlp_ratio, probability))
        self.depth = len(drop_path)

    def forward(self, x: Tensor, around: Neighbourhood) -> Tensor:
        """Run the blocks on rows (n, C)."""
        for number in range(self.depth):
            x = self.get_submodule(f"block{number}")(x, around, number % CURVES)
        return x


class PointTransformer(nn.Module):
    """Encoder of point clouds with features at several levels.

    Args:
        shape: Sizes.
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = Embedding(shape.in_channels, shape.channels[0])
        rates = torch.linspace(0, shape.drop_path, sum(shape.depths), device="cpu").tolist()
        self.enc = nn.Module()
        for level, depth in enumerate(shape.depths):
            before = sum(shape.depths[:level])
            self.enc.add_module(f"enc{level}", Stage(shape, level, rates[before : before + depth]))
        self.apply(initialise)

    def forward(
        self,
        cloud: PointCloud,
        mask: Tensor | None = None,
        orders: Tensor | None = None,
        depth: int | None = None,
    ) -> list[EncodedLevel]:
        """Encode a batch of clouds.

        Args:
            cloud: With ``grid_coord``.
            mask: (N,) bool, points whose features are hidden behind the mask token.
            orders: (levels, 4) int64 permutations of the curves, see `draw_orders`; None keeps
                them, for inference without chance.
            depth: Bits per voxel coordinate of the finest level's curves, one less at each
                further level. By default the largest coordinate of the whole batch decides, as in
                the released code; a cloud's Hilbert orders, and with them its features, then
                depend on the extent of its companions. With the same depth a batch gives what its
                clouds give alone.

        Returns:
            All levels, finest first.

        Raises:
            ValueError: ``grid_coord`` is missing, or shapes do not agree.
        """
        grid_coord = self._check(cloud, mask, orders)
        x = self.embedding(self._scale_colour(cloud.feat), mask)
        unordered = grid_coord.new_empty(CURVES, 0)
        level = EncodedLevel(
            x, cloud.coord, cloud.origin_coord, grid_coord, cloud.offset, None, unordered
        )
        levels: list[EncodedLevel] = []
        for number in range(self.shape.levels):
            stage = cast("Stage", self.enc.get_submodule(f"enc{number}"))
            level = level if stage.down is None else _pool(stage.down, level)
            around = find_neighbourhood(
                level.grid_coord,
                level.offset,
                self.shape.patch_size,
                None if orders is None else orders[number],
                None if depth is None else max(depth - number, 1),
            )
            level = level._replace(feat=stage(level.feat, around), order=around.order)
            levels.append(level)
        return levels

    def _scale_colour(self, feat: Tensor) -> Tensor:
        """Features (N, in) with the colour centred and scaled as the shape says."""
        centre, scale = self.shape.colour_centre, self.shape.colour_scale
        if centre == 0 and scale == 1:
            return feat
        feat = feat.clone()
        feat[:, _COLOUR] = (feat[:, _COLOUR] - centre) * scale
        return feat

    def _check(self, cloud: PointCloud, mask: Tensor | None, orders: Tensor | None) -> Tensor:
        """Voxels of a cloud whose parts agree."""
        count = len(cloud.feat)
        if cloud.grid_coord is None:
            raise ValueError("grid_coord=None: needed; compute it with grid_coordinates()")
        if not count or int(cloud.offset[-1]) != count or len(cloud.grid_coord) != count:
            raise ValueError(
                f"{count} features, {len(cloud.grid_coord)} voxels, last offset "
                f"{int(cloud.offset[-1])}: must be equal and > 0"
            )
        if mask is not None and mask.shape != (count,):
            raise ValueError(f"mask of shape {tuple(mask.shape)}: expected ({count},)")
        if orders is not None and orders.shape != (self.shape.levels, CURVES):
            expected = (self.shape.levels, CURVES)
            raise ValueError(f"orders of shape {tuple(orders.shape)}: expected {expected}")
        return cloud.grid_coord


def _pool(down: GridPooling, level: EncodedLevel) -> EncodedLevel:
    """Next level ahead of its blocks, not yet ordered."""
    batch = batch_numbers(level.offset)
    cells = group_cells(level.grid_coord, batch, len(level.offset))
    origin = None if level.origin_coord is None else cell_means(level.origin_coord, cells)
    return EncodedLevel(
        down(level.feat, cells),
        cell_means(level.coord, cells),
        origin,
        cells.grid_coord,
        cells.offset,
        cells.inverse,
        cells.grid_coord.new_empty(CURVES, 0),
    )


def initialise(module: nn.Module) -> None:
    """Truncated normal weights (0.02) and zero biases of linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def up_cast(levels: list[EncodedLevel], count: int) -> Tensor:
    """Features of level ``last - count`` beside those of all coarser levels, repeated.

    Args:
        levels: Of an encoder, finest first; unchanged.
        count: Levels to go up, from 0 to ``len(levels) - 1``.

    Returns:
        (n, sum of the widths of those levels).
    """
    if not 0 <= count < len(levels):
        raise ValueError(f"count={count}: must be in [0, {len(levels) - 1}]")
    feat = levels[-1].feat
    for number in range(len(levels) - 1, len(levels) - 1 - count, -1):
        inverse = levels[number].inverse
        if inverse is None:
            raise ValueError(f"level {number} has no inverse: pass the levels finest first")
        feat = torch.cat([levels[number - 1].feat, feat.index_select(0, inverse)], dim=1)
    return feat
