"""Small CLiFT networks, cameras and references shared by its tests."""

import math
import zlib
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.clift.clift import Clift, CliftShape
from models.clift.clustering import Clusters, nearest_members
from models.clift.rays import plucker_rays

SMALL = CliftShape(
    width=32,
    heads=4,
    encoder_layers=2,
    decoder_layers=2,
    feed_forward=48,
    patch_size=4,
    dropout=0.0,
)
DL3DV = replace(SMALL, qk_norm=True, input_norm=True)


def shake(module: nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Add noise to all weights, so that nothing is left at its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += scale * noise.to(parameter)


def small_clift(shape: CliftShape = SMALL, condense: bool = True) -> Clift:
    """Network with random weights in evaluation mode."""
    torch.manual_seed(0)
    model = Clift(shape, condense)
    shake(model)
    return model.eval()


def rule_v1(key: str, shape: torch.Size) -> Tensor:
    """Weights of a golden case, a function of key and shape."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if len(shape) >= 2:
        return noise / math.sqrt(math.prod(shape[1:]))
    if key.endswith("weight") and "norm" in key:
        return 1 + 0.1 * noise
    return 0.02 * noise


def random_poses(batch: int, views: int, seed: int = 0) -> Tensor:
    """(B, V, 4, 4) camera-to-world poses with random rotations and centres."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(batch, views, 3, 3, generator=generator))
    rotation = rotation * torch.linalg.det(rotation)[..., None, None]
    pose = torch.eye(4).repeat(batch, views, 1, 1)
    pose[..., :3, :3] = rotation
    pose[..., :3, 3] = torch.randn(batch, views, 3, generator=generator)
    return pose


def random_rays(batch: int, views: int, size: int, seed: int = 0) -> Tensor:
    """(B, V, 6, size, size) Plücker rays of random pinhole cameras."""
    intrinsics = torch.tensor([0.8 * size, 0.8 * size, size / 2, size / 2])
    intrinsics = intrinsics.expand(batch, views, 4)
    return plucker_rays(intrinsics, random_poses(batch, views, seed), size, size)


def random_clusters(tokens: Tensor, counts: list[int], seed: int = 0, padded: int = 0) -> Clusters:
    """Uneven clusters of all tokens but the last ``padded`` ones, none of them empty."""
    generator = torch.Generator().manual_seed(seed)
    batch, total = tokens.shape[:2]
    labels = torch.full((batch, total), -1)
    for scene, count in enumerate(counts):
        # The square makes low numbers frequent and high ones rare.
        drawn = (torch.rand(total - padded, generator=generator).square() * count).long()
        drawn[torch.randperm(total - padded, generator=generator)[:count]] = torch.arange(count)
        labels[scene, : total - padded] = drawn
    sizes = torch.tensor(counts)
    return Clusters(labels, nearest_members(tokens, labels, sizes), sizes)
