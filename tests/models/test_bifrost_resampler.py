"""Resampling blocks: shapes, order of the grid, BatchNorm and errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.bifrost.resampler import (
    ResampleBlock,
    resample_block,
    resampled_grid,
    square_grid,
    synchronise_batch_norm,
)
from tests.models.bifrost_flux import fill


def filled_block(scale: float) -> ResampleBlock:
    """Block with weights of the golden rule, in evaluation mode."""
    block = resample_block(6, scale)
    fill(block)
    return block.eval()


@pytest.mark.parametrize("scale", [2.0, 1.0, 0.5])
@pytest.mark.parametrize("grid", [(4, 4), (2, 6)])
@torch.no_grad()
def test_grid_is_resampled_in_raster_order(scale: float, grid: tuple[int, int]) -> None:
    block = filled_block(scale)
    latents = torch.randn(2, grid[0] * grid[1], 6, generator=torch.Generator().manual_seed(0))
    out = block(latents, grid)
    rows, columns = resampled_grid(grid, scale)
    assert out.shape == (2, rows * columns, 6)
    assert (out >= 0).all()
    # With the last norm silent, only the shortcut is left, which shows the order.
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    picture = latents.reshape(2, *grid, 6).permute(0, 3, 1, 2)
    resized = F.interpolate(picture, (rows, columns), mode="area" if scale < 1 else "nearest")
    expected = resized.relu().permute(0, 2, 3, 1).reshape(2, -1, 6)
    torch.testing.assert_close(block(latents, grid), expected)


def test_square_is_the_default_and_anything_else_is_an_error() -> None:
    block = filled_block(2.0)
    latents = torch.randn(1, 9, 6)
    assert torch.equal(block(latents), block(latents, (3, 3)))
    assert square_grid(256) == (16, 16)
    with pytest.raises(ValueError, match=r"^tokens=12: expected a square number; give the grid"):
        block(torch.zeros(1, 12, 6))
    with pytest.raises(ValueError, match=r"^grid=\(2, 4\): expected h \* w = 9"):
        block(latents, (2, 4))
    with pytest.raises(ValueError, match=r"^latents of shape \(1, 9, 5\): expected \(B, N, 6\)"):
        block(latents[..., :5])
    with pytest.raises(ValueError, match=r"^grid=\(3, 3\): expected even sides"):
        filled_block(0.5)(latents)


def test_impossible_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match=r"^scale=3: expected one of"):
        resample_block(4, 3)
    with pytest.raises(ValueError, match=r"^latent_channels=0: must be >= 1"):
        resample_block(0, 2.0)


def test_statistics_follow_training_and_stay_in_evaluation() -> None:
    block = resample_block(6, 2.0).train()
    latents = 3 + torch.randn(8, 16, 6)
    block(latents)
    assert block.bn1.num_batches_tracked == 1
    assert block.bn1.running_mean.any()
    before = {key: value.clone() for key, value in block.eval().state_dict().items()}
    alone = torch.cat([block(item[None]) for item in latents])
    torch.testing.assert_close(block(latents), alone)
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())


def test_synchronised_block_keeps_names_and_values() -> None:
    block = filled_block(2.0)
    parent = nn.ModuleDict({"up": block})
    before = parent.state_dict()
    expected = block(torch.ones(1, 4, 6))
    synchronise_batch_norm(parent)
    assert isinstance(block.bn1, nn.SyncBatchNorm)
    assert not block.bn1.training
    after = parent.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(block(torch.ones(1, 4, 6)), expected)
