"""Token selection beyond the golden cases."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.clift.rays import token_rays, view_directions
from models.clift.selection import (
    SelectionRule,
    nearest_tokens,
    score_tokens,
    select_tokens,
)
from tests.models.clift_networks import random_poses

SIZE = 64
INTRINSICS = torch.tensor([50.0, 50.0, SIZE / 2, SIZE / 2])


def nearby_poses(views: int, seed: int) -> Tensor:
    """(V, 4, 4) cameras that look roughly along z from places near the origin."""
    pose = random_poses(1, views, seed)[0]
    angle = 0.2 * torch.randn(views, generator=torch.Generator().manual_seed(seed))
    turn = torch.eye(4).repeat(views, 1, 1)
    turn[:, 0, 0], turn[:, 0, 2] = angle.cos(), angle.sin()
    turn[:, 2, 0], turn[:, 2, 2] = -angle.sin(), angle.cos()
    turn[:, :3, 3] = 0.5 * pose[:, :3, 3]
    return turn


def scene(views: int = 3) -> tuple[Tensor, Tensor]:
    """Rays and cameras of all tokens of a scene."""
    found = token_rays(INTRINSICS.expand(views, 4), nearby_poses(views, 0), SIZE, SIZE)
    return found.rays.flatten(0, 1), found.camera.flatten(0, 1)


def frames(count: int) -> tuple[Tensor, Tensor]:
    """Directions and camera centres of target views."""
    pose = nearby_poses(count, 1)
    directions = view_directions(INTRINSICS.expand(count, 4), pose, SIZE, SIZE, 16, 6)
    return directions, pose[:, :3, 3]


def test_matrix_product_scores_equal_distances_written_out() -> None:
    rays, camera = scene()
    directions, centres = frames(2)
    for view in range(2):
        cosine = (rays[:, None, 3:].double() * directions[view].double()).sum(-1)
        apart = (camera - centres[view]).double().norm(dim=-1) / 3**0.5
        expected = (cosine.clamp(-1, 1).acos() + 0.02 * apart[:, None]).min(1).values
        scores = score_tokens(rays, camera, directions, centres)[view]
        assert_close(scores.double(), expected, atol=5e-4, rtol=0)
        slow = select_tokens(rays, camera, directions[view], centres[view], 40, SelectionRule())
        assert_close(slow.scores, scores, atol=1e-6, rtol=0)
        assert torch.equal(slow.positions, nearest_tokens(scores, 40))


def test_scores_of_a_batch_of_scenes_equal_those_of_each() -> None:
    rays, camera = scene()
    directions, centres = frames(4)
    batch = score_tokens(
        torch.stack([rays, rays.flip(0)]),
        torch.stack([camera, camera.flip(0)]),
        directions.view(2, 2, 36, 3),
        centres.view(2, 2, 3),
    )
    assert batch.shape == (2, 2, len(rays))
    assert_close(batch[0], score_tokens(rays, camera, directions[:2], centres[:2]))
    assert_close(batch[1].flip(-1), score_tokens(rays, camera, directions[2:], centres[2:]))


def test_same_ray_of_the_same_camera_is_at_distance_zero() -> None:
    # Directions whose squared length rounds below one: their cosine alone gives 3e-4 radians.
    direction = torch.nn.functional.normalize(
        torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    rays = torch.cat([torch.zeros(500, 3), direction], dim=1)
    camera = torch.zeros(500, 3)
    assert (direction.square().sum(-1) < 1).any()
    for shift, zero in ((0.0, True), (5e-4, True), (0.1, False)):
        centre = torch.tensor([shift, 0.0, 0.0])
        extra = 0.02 * shift / 3**0.5
        fast = score_tokens(rays, camera, direction[None], centre[None])[0] - extra
        slow = select_tokens(rays, camera, direction, centre, 3, SelectionRule()).scores - extra
        assert (fast.abs() < 1e-7).all() == zero
        assert (slow.abs() < 1e-7).all() == zero


def test_every_cell_gets_its_nearest_token_before_the_rest() -> None:
    rays, camera = scene()
    directions, centres = frames(1)
    cosine = rays[:, 3:] @ directions[0].T
    apart = (camera - centres[0]).norm(dim=-1, keepdim=True) / 3**0.5
    distances = cosine.clamp(-1, 1).acos() + 0.02 * apart
    first = set(distances.argmin(0).tolist())
    rank = distances.min(1).values.argsort().tolist()
    for keep in (len(first) - 3, len(first), len(first) + 7):
        found = select_tokens(
            rays, camera, directions[0], centres[0], keep, SelectionRule(cell_tokens=1)
        )
        inside = [token for token in rank if token in first]
        outside = [token for token in rank if token not in first]
        assert set(found.positions.tolist()) == set((inside + outside)[:keep])
    none = select_tokens(
        rays, camera, directions[0], centres[0], 100, SelectionRule(cell_tokens=None)
    )
    two = select_tokens(rays, camera, directions[0], centres[0], 100, SelectionRule(cell_tokens=2))
    assert torch.equal(none.positions, two.positions)  # 100 // 36


def test_momentum_and_bonus_use_only_the_frame_before() -> None:
    rays, camera = scene()
    directions, centres = frames(3)
    rule = SelectionRule(momentum=0.5, bonus=0.03)
    state, distances = None, None
    for frame in range(3):
        found = select_tokens(rays, camera, directions[frame], centres[frame], 30, rule, state)
        fresh = select_tokens(rays, camera, directions[frame], centres[frame], 30, SelectionRule())
        expected = fresh.state.distances
        if state is not None and distances is not None:
            expected = 0.5 * (expected - 0.03 * state.chosen[:, None].float()) + 0.5 * distances
        assert_close(found.state.distances, expected)
        assert found.state.chosen.nonzero().squeeze(1).tolist() == found.positions.tolist()
        state, distances = found.state, expected
    again = select_tokens(rays, camera, directions[0], centres[0], 30, rule)
    assert_close(again.scores, score_tokens(rays, camera, directions[:1], centres[:1])[0])


def test_padded_tokens_are_chosen_last() -> None:
    scores = torch.tensor([[0.3, 0.1, 0.2, 0.0]])
    valid = torch.tensor([[True, True, True, False]])
    assert nearest_tokens(scores, 2, valid).tolist() == [[1, 2]]
    assert nearest_tokens(scores, 2).tolist() == [[1, 3]]


def test_wrong_arguments_are_named_in_one_line() -> None:
    with pytest.raises(ValueError, match="keep=5: must be from 1 to the 4 stored tokens"):
        nearest_tokens(torch.zeros(4), 5)
    with pytest.raises(ValueError, match="momentum=1"):
        SelectionRule(momentum=1.0)
    with pytest.raises(ValueError, match="cell_tokens=-1"):
        SelectionRule(cell_tokens=-1)
