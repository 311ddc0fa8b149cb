"""Rays, normals and cameras of the procedural rooms against what is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.paired_2d3d.rgbd_frames import back_project, project, to_world
from datamodules.paired_2d3d.room_cameras import look_at
from datamodules.paired_2d3d.room_layout import Room, draw_room
from datamodules.paired_2d3d.room_rendering import RoomRenderer, room_camera
from datamodules.paired_2d3d.room_solids import Camera, Shape, Solids, cast_rays, surface_frames
from datamodules.paired_2d3d.room_textures import CLASS_NAMES

TURN = 0.4
AXES = np.array([[np.cos(TURN), np.sin(TURN), 0], [-np.sin(TURN), np.cos(TURN), 0], [0, 0, 1]])


def solid(shape: Shape, half: tuple[float, float, float], centre: tuple[float, ...]) -> Solids:
    return Solids(np.array([shape]), np.array([centre], dtype=float), AXES[None], np.array([half]))


def seen_from(place: tuple[float, float, float], target: tuple[float, float, float]) -> Camera:
    return room_camera(look_at(np.array(place), np.array(target)), 96)


@pytest.fixture(scope="module")
def room() -> Room:
    return draw_room(np.random.default_rng(3), "seen")


def distances(solids: Solids, points: np.ndarray) -> np.ndarray:
    """Distance of points from the surface of the only solid, zero on it."""
    unit = (points - solids.centre[0]) @ solids.axes[0].T
    half = solids.half[0]
    if solids.shape[0] == Shape.SPHERE:
        return np.linalg.norm(unit, axis=1) - half[0]
    if solids.shape[0] == Shape.CYLINDER:
        outside = np.stack((np.hypot(unit[:, 0], unit[:, 1]) - half[0], abs(unit[:, 2]) - half[2]))
        return outside.max(0)
    return (np.abs(unit) - half).max(1)


@pytest.mark.parametrize(
    ("shape", "half"),
    [
        (Shape.BOX, (0.3, 0.2, 0.4)),
        (Shape.CYLINDER, (0.25, 0.25, 0.3)),
        (Shape.SPHERE, (0.3, 0.3, 0.3)),
    ],
)
@pytest.mark.parametrize("place", [(1.5, 1.0, 0.5), (0.4, -0.3, 2.0), (-1.4, 0.2, -0.8)])
def test_hits_lie_on_the_solid_and_cover_all_of_it(
    shape: Shape, half: tuple[float, float, float], place: tuple[float, float, float]
) -> None:
    solids = solid(shape, half, (0.1, 0.2, 0.3))
    camera = seen_from(place, (0.1, 0.2, 0.3))
    hits = cast_rays(solids, camera)
    seen = hits.solid == 0
    points = to_world(back_project(hits.depth, camera.intrinsics), camera.pose)[seen]
    assert np.abs(distances(solids, points)).max() < 1e-5
    # Normals look at the camera, and every ray that passes the centre closely is a hit.
    normal, _ = surface_frames(solids, np.zeros(len(points), dtype=np.int64), points)
    assert ((camera.pose[:3, 3] - points) * normal).sum(1).min() > 0
    middle = np.hypot(*np.meshgrid(np.arange(96) - 47.5, np.arange(96) - 47.5)) < 4
    assert seen[middle].all()
    # Points inside the solid project onto pixels that hit it.
    inner = np.random.default_rng(0).uniform(-0.7, 0.7, (200, 3)) * half
    inner = inner[distances(solids, inner @ solids.axes[0] + solids.centre[0]) < 0]
    pixel, _ = project(inner @ solids.axes[0] + solids.centre[0], camera.pose, camera.intrinsics)
    column, row = np.floor(pixel).astype(int).T
    inside = ((pixel >= 0) & (pixel < 96)).all(1)
    assert inside.sum() > 100
    assert seen[row[inside], column[inside]].mean() > 0.97  # but for pixels on the outline


def test_box_depth_is_the_distance_to_its_side() -> None:
    solids = Solids(
        np.array([Shape.BOX]),
        np.array([[0.0, 2.0, 0.0]]),
        np.eye(3)[None],
        np.array([[1.0, 0.5, 1.0]]),
    )
    camera = seen_from((0, 0, 0), (0, 1, 0))
    depth = cast_rays(solids, camera).depth
    np.testing.assert_allclose(depth[40:56, 40:56], 1.5, rtol=1e-6)


def test_corner_of_a_crate_projects_where_its_label_starts(room: Room) -> None:
    renderer = RoomRenderer(room, "seen")
    camera = room_camera(room.image_poses[0], 160)
    seen = renderer.render(camera)
    checked = 0
    for k in np.flatnonzero(room.segment == CLASS_NAMES.index("pouf")):
        place, depth = project(room.solids.centre[k][None], camera.pose, camera.intrinsics)
        if depth[0] <= 0 or not ((place >= 0) & (place < 160)).all():
            continue
        column, row = np.floor(place[0]).astype(int)
        # The nearest surface along the way to its middle is its own, or stands in front of it.
        assert seen.depth[row, column] < depth[0]
        if seen.instance[row, column] == room.instance[k]:
            assert seen.segment[row, column] == room.segment[k]
            checked += 1
    assert checked > 0


def test_rooms_have_the_classes_and_nothing_overlaps() -> None:
    for number in range(12):
        room = draw_room(np.random.default_rng(number), "seen")
        counts = np.bincount(room.segment, minlength=8)
        assert counts[0] == 1
        assert 2 <= counts[1] <= 4
        assert 1 <= counts[2] <= 2
        assert counts[3] >= 2
        assert counts[4] >= 2
        assert 4 <= counts[5] + counts[6] <= 7
        rugs = np.flatnonzero(room.segment == 2)
        if len(rugs) == 2:
            local = room.solids.axes[rugs[0]] @ np.diff(room.solids.centre[rugs], axis=0)[0]
            gap = np.abs(local[:2]) - room.solids.half[rugs, :2].sum(0)
            assert gap.max() > 0


def test_crates_and_poufs_share_geometry_and_materials_are_shared_by_classes() -> None:
    shapes: dict[int, set[int]] = {5: set(), 6: set()}
    materials: dict[str, set[int]] = {}
    for number in range(30):
        room = draw_room(np.random.default_rng(number), "seen")
        for k, segment in enumerate(room.segment.tolist()):
            if segment in shapes:
                shapes[segment].add(int(room.solids.shape[k]))
            materials.setdefault(room.skins[k].material.photo, set()).add(segment)
    assert shapes[5] == shapes[6] == {Shape.BOX, Shape.CYLINDER}
    assert sum(len(classes) > 1 for classes in materials.values()) >= 6


def test_cameras_see_the_room(room: Room) -> None:
    renderer = RoomRenderer(room, "seen")
    for pose in (*room.image_poses, *room.extra_poses):
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
        assert pose[2, 1] < 0  # the image's down axis points down
        seen = renderer.render(room_camera(pose, 48))
        assert (seen.segment >= 0).mean() > 0.5
        assert ((seen.depth > 0) == (seen.segment >= 0)).all()
        assert seen.depth[seen.depth > 0].min() > 0.1


def test_a_point_has_one_colour_in_all_pictures(room: Room) -> None:
    renderer = RoomRenderer(room, "seen")
    first, second = (room_camera(pose, 128) for pose in room.image_poses[:2])
    one, other = renderer.render(first), renderer.render(second)
    points = to_world(back_project(one.depth, first.intrinsics), first.pose)[one.depth > 0]
    place, depth = project(points, second.pose, second.intrinsics)
    inside = ((place >= 0) & (place < 128)).all(1)
    column, row = np.floor(place[inside]).astype(int).T
    same = np.abs(other.depth[row, column] - depth[inside]) < 0.02
    difference = np.abs(
        one.colour[one.depth > 0][inside][same].astype(float) - other.colour[row, column][same]
    ).mean()
    assert same.sum() > 2000
    assert difference < 20  # of 255; texture detail and levels of detail differ
