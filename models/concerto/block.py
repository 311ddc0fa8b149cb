"""Block of Point Transformer V3: position encoding, patch attention, feed-forward network.

Module names are those of the released state dicts. Letters in shape comments: N points of a level,
B clouds, C channels.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from models.concerto.clouds import batch_numbers
from models.concerto.patch_attention import PatchAttention, Patches
from models.concerto.serialization import serialize
from models.concerto.submanifold import NeighbourPairs, SubmanifoldConv3d, neighbour_pairs


class Neighbourhood(NamedTuple):
    """What the blocks of a level share.

    Attributes:
        pairs: Neighbouring voxels.
        patches: Attention patches.
        order: (4, n) int64.
        inverse: (4, n) int64.
    """

    pairs: NeighbourPairs
    patches: Patches
    order: Tensor
    inverse: Tensor


def find_neighbourhood(
    grid_coord: Tensor,
    offset: Tensor,
    patch_size: int,
    shuffle: Tensor | None = None,
    depth: int | None = None,
) -> Neighbourhood:
    """Serialize a level and find its neighbours.

    Args:
        grid_coord: (n, 3) int64 >= 0.
        offset: (B,) int64.
        patch_size: Points of an attention patch.
        shuffle: (4,) int64 permutation of the curves; None keeps them.
        depth: Bits per coordinate of the curves, see `serialize`.
    """
    batch = batch_numbers(offset)
    curves = serialize(grid_coord, batch, depth)
    order, inverse = curves.order, curves.inverse
    if shuffle is not None:
        order, inverse = order[shuffle.to(order.device)], inverse[shuffle.to(order.device)]
    pairs = neighbour_pairs(grid_coord, batch)
    return Neighbourhood(pairs, Patches(offset, patch_size), order, inverse)


class DropPath(nn.Module):
    """Drop a residual branch at random points and scale it up at the others.

    Args:
        probability: Of dropping a point, in [0, 1).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Drop rows (N, C) in training."""
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        return x * x.new_empty(len(x), 1).bernoulli_(keep).div_(keep)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them.

    Args:
        channels: Width.
        hidden: Hidden width.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Transform rows (N, C)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Conditional position encoding, patch attention and feed-forward network, all residual.

    Args:
        channels: Width C.
        heads: Attention heads.
        mlp_ratio: Hidden width over C.
        drop_path: Probability of dropping a point from attention, and from the network.
    """

    def __init__(self, channels: int, heads: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.cpe = nn.ModuleList(
            [
                SubmanifoldConv3d(channels, channels),
                nn.Linear(channels, channels),
                nn.LayerNorm(channels),
            ]
        )
        self.norm1 = nn.Sequential(nn.LayerNorm(channels))
        self.attn = PatchAttention(channels, heads)
        self.norm2 = nn.Sequential(nn.LayerNorm(channels))
        self.mlp = nn.Sequential(FeedForward(channels, mlp_ratio * channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, around: Neighbourhood, curve: int) -> Tensor:
        """Transform rows (N, C); ``curve`` is the row of the order that is used."""
        convolution, linear, norm = self.cpe
        x = x + norm(linear(convolution(x, around.pairs)))
        order, inverse = around.order[curve], around.inverse[curve]
        x = x + self.drop_path(self.attn(self.norm1(x), around.patches, order, inverse))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out
