"""Procedural scenes: what is drawn, what depends on what, and textures without seams."""

from __future__ import annotations

import pytest
import torch

from datamodules.multiview.procedural_render import render_views
from datamodules.multiview.procedural_scene import (
    CONTEXT_FRAMES,
    QUADRANT_VIEWS,
    TARGET_FRAMES,
    sample_scenes,
)
from datamodules.multiview.procedural_surfaces import look_up_texture
from datamodules.multiview.procedural_textures import PHOTOS, TILES, build_atlas, tile_texels


def test_a_scene_depends_on_its_own_number_only() -> None:
    together, poses = sample_scenes(0, "train", [3, 5, 9])
    alone, pose = sample_scenes(0, "train", [5])
    assert torch.equal(poses[1], pose[0])
    for field, of_one in zip(together, alone, strict=True):
        assert torch.equal(field[1], of_one[0])


@pytest.mark.parametrize("other", [(1, "train", [5]), (0, "test", [5]), (0, "train", [6])])
def test_seed_split_and_number_each_change_the_scene(other: tuple[int, str, list[int]]) -> None:
    seed, split, numbers = other
    room = sample_scenes(0, "train", [5])[0].room
    assert not torch.equal(room, sample_scenes(seed, split, numbers)[0].room)  # type: ignore[arg-type]


def test_pictures_do_not_depend_on_the_batch() -> None:
    atlas = build_atlas("train", 0, 32)
    scenes, poses = sample_scenes(0, "train", range(3))
    together = render_views(scenes, poses, atlas, 24)
    for number in range(3):
        alone = render_views(*sample_scenes(0, "train", [number]), atlas, 24)
        assert torch.equal(alone[0], together[number])


def test_supersampling_averages_the_finer_picture() -> None:
    atlas = build_atlas("train", 0, 32)
    scenes, poses = sample_scenes(0, "train", [0])
    fine = render_views(scenes, poses, atlas, 32, samples=1)
    mean = fine.reshape(1, 14, 3, 16, 2, 16, 2).mean((4, 6))
    assert torch.allclose(render_views(scenes, poses, atlas, 16), mean, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_any_picture_size_is_rendered(size: int) -> None:
    scenes, poses = sample_scenes(0, "test", [0])
    pictures = render_views(scenes, poses, build_atlas("test", 0, tile_texels(size)), size)
    assert pictures.shape == (1, 14, 3, size, size)
    assert pictures.isfinite().all()
    assert 0 <= pictures.min() <= pictures.max() <= 1


def test_a_larger_picture_shows_the_same_scene() -> None:
    scenes, poses = sample_scenes(0, "test", range(2))
    atlas = build_atlas("test", 0, 32)
    small, large = (render_views(scenes, poses[:, :4], atlas, size) for size in (32, 128))
    reduced = torch.nn.functional.avg_pool2d(large.flatten(0, 1), 4)
    assert (reduced - small.flatten(0, 1)).square().mean().sqrt() < 0.02


def test_views_0_to_7_stand_in_the_quadrants_and_all_cameras_inside_the_room() -> None:
    scenes, poses = sample_scenes(0, "train", range(200))
    place = poses[:, :, :3, 3]
    quadrant = (place[:, :QUADRANT_VIEWS, 0] > 0) * 2 + (place[:, :QUADRANT_VIEWS, 1] > 0)
    assert torch.equal(quadrant, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]).expand(200, 8))
    assert (place > scenes.room[:, None, 0]).all()
    assert (place < scenes.room[:, None, 1]).all()
    assert (
        place[:, :, 2] < (scenes.sphere_centre[:, :, 2] - scenes.sphere_radius).amin(1)[:, None]
    ).all()
    assert CONTEXT_FRAMES == (0, 2, 4, 6)
    assert TARGET_FRAMES == (8, 9, 10, 11, 12, 13)


def test_the_splits_share_no_photograph() -> None:
    assert not set(PHOTOS["train"]) & set(PHOTOS["test"])


def test_an_atlas_is_a_function_of_split_and_seed() -> None:
    atlas = build_atlas("train", 0, 32)
    assert atlas.shape == (3, TILES, 32, 32)
    assert 0 <= atlas.min() < 0.05 < 0.95 < atlas.max() <= 1
    assert torch.equal(atlas, build_atlas("train", 0, 32))
    assert not torch.equal(atlas, build_atlas("train", 1, 32))
    assert not torch.equal(atlas, build_atlas("test", 0, 32))


def test_textures_are_exact_at_texels_and_continue_mirrored_without_seams() -> None:
    atlas = build_atlas("test", 0, 32)
    centres = (torch.arange(32) + 0.5) / 32
    tile = torch.full((32,), 5)
    read = look_up_texture(atlas, tile, torch.stack((centres, centres.flip(0))))
    diagonal = atlas[:, 5].flip(1).diagonal(dim1=1, dim2=2)
    assert torch.allclose(read, diagonal, atol=1e-5)
    for turns in (-3.0, -2.0, 1.0, 2.0, 8.0):
        near, across = turns + centres, turns - centres
        here = look_up_texture(atlas, tile, torch.stack((near, centres)))
        there = look_up_texture(atlas, tile, torch.stack((across, centres)))
        assert torch.allclose(here, there, atol=1e-4)
    line = torch.linspace(-4, 4, 8193)
    colours = look_up_texture(atlas, tile.repeat(257)[:8193], torch.stack((line, line * 0.7)))
    steepest = (atlas[:, 5].diff(dim=1).abs().max() + atlas[:, 5].diff(dim=2).abs().max()) * 32
    assert colours.diff(dim=1).abs().max() <= steepest * 8 / 8192 * 1.01
