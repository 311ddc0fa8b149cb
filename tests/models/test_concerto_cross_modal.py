"""The cross-modal loss: the released value and gradients, and zero for affine copies."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from models.concerto.clouds import batch_numbers
from models.concerto.cross_modal import (
    PatchMeans,
    cross_modal_loss,
    patch_means,
    patch_numbers,
    pool_correspondence,
)
from tests.models.concerto_cases import fill, read_case

GRID = (5, 5)


class Golden(NamedTuple):
    case: dict[str, Tensor]
    pooled: Tensor
    means: PatchMeans
    predicted: Tensor
    loss: Tensor
    feat: Tensor
    projection: nn.Linear


@pytest.fixture(scope="module")
def golden() -> Golden:
    description, case = read_case("losses_crossmodal")
    projection = nn.Linear(*reversed(description["state_dict"]["patch_proj.weight"]))
    fill(projection, "patch_proj.")
    feat = case["in.feat"].clone().requires_grad_()
    batch = batch_numbers(case["in.offset"])
    pooled = pool_correspondence(case["in.correspondence"], case["in.pooling_inverse"], len(feat))
    principal = pooled.masked_fill(batch[:, None, None] % 2 == 1, -1)
    rows, patches = patch_numbers(principal, batch // 2, case["in.img_num"], GRID)
    means = patch_means(feat, rows, patches)
    predicted = projection(means.feature)
    target = case["in.image_tokens"][:, 5:].flatten(0, 1)[means.patch]
    loss = cross_modal_loss(predicted, target)
    (0.5 * loss).backward()
    return Golden(case, pooled, means, predicted, loss, feat, projection)


def test_correspondence_is_pooled_as_released(golden: Golden) -> None:
    expected = golden.case["out.pooled_correspondence"]
    torch.testing.assert_close(golden.pooled, expected, atol=1e-5, rtol=0)


def test_patches_and_their_features_are_the_released_ones(golden: Golden) -> None:
    filled = golden.case["out.patch_has_points"].nonzero()[:, 0]
    assert torch.equal(golden.means.patch, filled)
    for ours, name in ((golden.means.feature, "patch_mean_feat"), (golden.predicted, "patch_proj")):
        expected = golden.case[f"out.{name}"][filled]
        torch.testing.assert_close(ours.detach(), expected, atol=1e-5, rtol=0)


def test_loss_and_gradients_are_the_released_ones(golden: Golden) -> None:
    loss = float(golden.loss.detach())
    assert loss == pytest.approx(float(golden.case["out.enc2d_loss"]), abs=2e-5)
    assert loss / 2 == pytest.approx(float(golden.case["out.loss"]), abs=2e-5)
    projection = golden.projection
    gradients = {
        "grad_feat": golden.feat.grad,
        "grad.patch_proj.weight": projection.weight.grad,
        "grad.patch_proj.bias": projection.bias.grad,
    }
    for name, gradient in gradients.items():
        expected = golden.case[f"out.{name}"]
        assert gradient is not None
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (3.0, -2.0), (0.02, 40.0)])
@pytest.mark.parametrize("channels", [112, 1536])
def test_affine_copies_have_no_loss(scale: float, shift: float, channels: int) -> None:
    target = torch.randn(40, channels, generator=torch.Generator().manual_seed(0))
    copy = (scale * target.double() + shift).float()
    rounding = 2e-5 if shift > 9 else 1e-6  # a small copy far from 0 is itself rounded
    assert float(cross_modal_loss(copy, target)) == pytest.approx(0, abs=rounding)
    assert float(cross_modal_loss(-target, target)) == pytest.approx(20, abs=1e-5)
    unrelated = torch.randn(40, channels, generator=torch.Generator().manual_seed(1))
    assert float(cross_modal_loss(unrelated, target)) == pytest.approx(10, abs=0.5)


def test_loss_is_float32_and_finite_under_autocast() -> None:
    target = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert float(cross_modal_loss(2 * target + 1, target)) == pytest.approx(0, abs=1e-6)
        assert float(cross_modal_loss(torch.ones(4, 32), target)) == pytest.approx(10)  # constant


def test_voxels_take_the_mean_of_the_visible_points() -> None:
    hidden = [-1.0, -1.0]
    points = torch.tensor(
        [[[1.0, 2.0], hidden], [[2.0, 4.0], hidden], [hidden, hidden], [hidden, [0.0, 0.25]]]
    )
    pooled = pool_correspondence(points, torch.tensor([0, 0, 0, 2]), 3)
    assert pooled.tolist() == [[[1.5, 3.0], hidden], [hidden, hidden], [hidden, [0.0, 0.25]]]


def test_patches_follow_the_images_of_their_items() -> None:
    """Items with 2, 0 and 1 images: 2 x 3 patches each, in the order of the images."""
    seen, hidden = [1.9, 2.1], [-1.0, -1.0]
    correspondence = torch.tensor([[seen, hidden], [seen, seen], [seen, seen], [hidden, seen]])
    item, number = torch.tensor([0, 0, 2, 1]), torch.tensor([2, 0, 1])
    rows, patches = patch_numbers(correspondence, item, number, (2, 3))
    # The last item's second image and those of the item without any do not exist.
    assert list(zip(rows.tolist(), patches.tolist(), strict=True)) == [
        (0, 5), (1, 5), (1, 11), (2, 17)
    ]  # fmt: skip


@pytest.mark.parametrize("place", [(2.0, 0.0), (0.0, 3.0), (-0.5, 1.0), (1.0, -1.0)])
def test_places_outside_the_image_are_not_seen(place: tuple[float, float]) -> None:
    correspondence = torch.tensor([[place]])
    rows, _ = patch_numbers(correspondence, torch.tensor([0]), torch.tensor([1]), (2, 3))
    assert len(rows) == 0


def test_means_are_over_points_of_all_rows_and_sorted() -> None:
    features = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
    means = patch_means(features, torch.tensor([0, 1, 1]), torch.tensor([7, 7, 2]))
    assert means.patch.tolist() == [2, 7]
    assert means.feature.tolist() == [[3.0, 2.0], [2.0, 1.0]]


def test_no_patches_give_no_loss_but_keep_the_graph() -> None:
    projection = nn.Linear(3, 4)
    features = torch.randn(5, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    means = patch_means(features, none, none)
    loss = cross_modal_loss(projection(means.feature), torch.zeros(0, 4))
    loss.backward()
    assert float(loss.detach()) == 0
    for gradient in (projection.weight.grad, projection.bias.grad, features.grad):
        assert gradient is not None
        assert gradient.abs().max() == 0
