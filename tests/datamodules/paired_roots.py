"""A tiny root in Pointcept's layout, written by hand: boxes of points, cameras that see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Camera(NamedTuple):
    """A pinhole camera, OpenCV axes.

    Attributes:
        intrinsic: (3, 3).
        pose: (4, 4) camera to world.
        height: pixels.
        width: pixels.
    """

    intrinsic: NDArray[np.float64]
    pose: NDArray[np.float64]
    height: int
    width: int

    def project(self, coord: NDArray[np.floating]) -> NDArray[np.float64]:
        """Column, row and depth (N, 3) of points (N, 3)."""
        local = (coord - self.pose[:3, 3]) @ self.pose[:3, :3]
        column_row = (local @ self.intrinsic.T)[:, :2] / np.where(local[:, 2:] > 0, local[:, 2:], 1)
        return np.concatenate((column_row, local[:, 2:]), axis=1)


def look_at(eye: tuple[float, ...], target: tuple[float, ...], height: int, width: int) -> Camera:
    """A camera at ``eye`` that sees ``target`` in its middle, z up."""
    forward = np.subtract(target, eye).astype(float)
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, (0, 0, 1.0))
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack((right, np.cross(forward, right), forward), axis=1)
    pose[:3, 3] = eye
    focal = 0.8 * width
    intrinsic = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return Camera(intrinsic, pose, height, width)


def room_points(points: int, seed: int = 0) -> tuple[NDArray[np.float32], ...]:
    """Coordinates, colours and normals of a floor and two walls of 3 x 3 m, 2 m high."""
    generator = np.random.default_rng(seed)
    place = generator.random((points, 2))
    plane = generator.integers(0, 3, points)
    coord = np.zeros((points, 3))
    normal = np.zeros((points, 3))
    for axis, (first, second, far) in enumerate(((0, 1, 3.0), (1, 2, 2.0), (0, 2, 2.0))):
        chosen = plane == axis
        coord[chosen, first] = 3 * place[chosen, 0]
        coord[chosen, second] = far * place[chosen, 1]
        normal[chosen, 3 - first - second] = 1
    colour = (255 * (0.2 + 0.2 * coord)).clip(0, 255)
    return coord.astype(np.float32), colour.astype(np.uint8), normal.astype(np.float32)


def room_cameras(sizes: tuple[tuple[int, int], ...]) -> list[Camera]:
    """Cameras in the room's open corner, of the given heights and widths."""
    return [
        look_at((2.8, 2.6 - 0.2 * number, 1.7), (0.8, 0.8, 0.4), *size)
        for number, size in enumerate(sizes)
    ]


def visible_links(camera: Camera, coord: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rows (column, row, point) of the points within the picture; the room hides none."""
    place = camera.project(coord)
    inside = (place >= 0).all(axis=1) & (place[:, 0] < camera.width) & (place[:, 1] < camera.height)
    rows = np.flatnonzero(inside)
    return np.concatenate((np.floor(place[rows, :2]), rows[:, None]), axis=1)


def write_scene(
    root: Path,
    split: str,
    scene: str,
    *,
    points: int = 600,
    sizes: tuple[tuple[int, int], ...] = ((48, 64), (60, 80)),
    seed: int = 0,
    name: str = "toy",
) -> dict[str, object]:
    """Write one room; the entry of the split file that names it."""
    coord, colour, normal = room_points(points, seed)
    folder = root / split / scene
    pictures = root / "images" / split / scene
    for part in (folder, *(pictures / kind for kind in ("color", "correspondence", "pose"))):
        part.mkdir(parents=True)
    (pictures / "intrinsic").mkdir()
    np.save(folder / "coord.npy", coord)
    np.save(folder / "color.npy", colour)
    np.save(folder / "normal.npy", normal)
    np.save(folder / "segment.npy", normal.argmax(axis=1))
    for number, camera in enumerate(room_cameras(sizes)):
        np.save(pictures / "correspondence" / f"{number}.npy", visible_links(camera, coord))
        np.save(pictures / "intrinsic" / f"{number}.npy", camera.intrinsic)
        np.save(pictures / "pose" / f"{number}.npy", camera.pose)
        place = np.indices((camera.height, camera.width))
        pixels = np.stack((place[0] * 4, place[1] * 3, np.full_like(place[0], 50 * number)), axis=2)
        Image.fromarray(pixels.astype(np.uint8)).save(pictures / "color" / f"{number}.png")
    start = f"data/{name}/images/{split}/{scene}"
    return {
        "pointclouds": f"data/{name}/{split}/{scene}",
        "images": [f"{start}/color/{number}.png" for number in range(len(sizes))],
        "correspondences": [f"{start}/correspondence/{n}.npy" for n in range(len(sizes))],
    }


def write_split(root: Path, split: str, items: dict[str, dict[str, object]]) -> None:
    """Write a split file."""
    (root / "splits").mkdir(exist_ok=True)
    (root / "splits" / f"{split}.json").write_text(json.dumps(items))


def paired_root(root: Path, train: int = 4, val: int = 2, points: int = 600) -> Path:
    """A root with a train and a val split of rooms with two photographs each."""
    for split, count in (("train", train), ("val", val)):
        items = {
            f"{split}{number}_0": write_scene(
                root, split, f"{split}{number}", seed=number, points=points
            )
            for number in range(count)
        }
        write_split(root, split, items)
    return root
