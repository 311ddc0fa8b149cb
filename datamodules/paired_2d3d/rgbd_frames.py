"""Posed RGB-D frames: pinhole projection, and points out of depth maps.

Images are indexed (row, column); the pixel in column u and row v covers [u, u + 1) x [v, v + 1), so
that pixel centres lie at half-integers and cx = width / 2 is the middle of the image. Cameras have
OpenCV axes: x right, y down, z forward. Depth is along z, in metres.

Shape letters: H x W pixels of the image, h x w pixels of the depth map, N points, P pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


@dataclass(frozen=True)
class RgbdFrame:
    """One picture with depth and a calibrated camera.

    Attributes:
        name: file stem that it is written under.
        colour: (H, W, 3) uint8.
        depth: (h, w) float32, metres; 0 where it is unknown. Its size may differ from the image's.
        pose: (4, 4) float64 camera to world.
        intrinsics: (3, 3) float64 of the image, pixels, without skew.
        depth_intrinsics: (3, 3) float64 of the depth map, pixels; the two share one camera centre.
        segment: (h, w) integer class of every depth pixel, -1 unlabelled; None without labels.
        instance: (h, w) integer thing at every depth pixel, -1 none; None without.
        in_cloud: whether its depth adds to the cloud.
        in_items: whether its image is written and linked with the cloud.
    """

    name: str
    colour: NDArray[np.uint8]
    depth: NDArray[np.float32]
    pose: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    depth_intrinsics: NDArray[np.float64]
    segment: NDArray[np.int64] | None = None
    instance: NDArray[np.int64] | None = None
    in_cloud: bool = True
    in_items: bool = True


class FrameSource(Protocol):
    """Frames in order, which are passed more than once and need not fit in memory together."""

    def __len__(self) -> int:
        """Number of frames at most; unusable ones may be left out."""
        ...

    def __iter__(self) -> Iterator[RgbdFrame]:
        """The frames, from the first, at every call."""
        ...


def scale_intrinsics(
    intrinsics: NDArray[np.float64], size: tuple[int, int], new_size: tuple[int, int]
) -> NDArray[np.float64]:
    """Intrinsics (3, 3) of an image of (height, width) after it was resized to another."""
    factors = np.array([new_size[1] / size[1], new_size[0] / size[0], 1.0])
    scaled: NDArray[np.float64] = intrinsics * factors[:, None]
    return scaled


def pixel_rays(
    size: tuple[int, int], intrinsics: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where rays through the columns (w,) and rows (h,) of an image cross the plane at depth 1.

    Args:
        size: height and width, pixels.
        intrinsics: (3, 3) without skew, pixels.
    """
    across = (np.arange(size[1]) + 0.5 - intrinsics[0, 2]) / intrinsics[0, 0]
    down = (np.arange(size[0]) + 0.5 - intrinsics[1, 2]) / intrinsics[1, 1]
    return across, down


def back_project(
    depth: NDArray[np.float32], intrinsics: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Points (h, w, 3) of all pixel centres in the camera's frame, metres; 0 where depth is 0."""
    across, down = pixel_rays((depth.shape[0], depth.shape[1]), intrinsics)
    points = np.empty((*depth.shape, 3))
    points[..., 0] = across[None] * depth
    points[..., 1] = down[:, None] * depth
    points[..., 2] = depth
    return points


def to_world(points: NDArray[np.float64], pose: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (..., 3) of a camera's frame in the world."""
    moved: NDArray[np.float64] = points @ pose[:3, :3].T + pose[:3, 3]
    return moved


def project(
    coord: NDArray[np.float64], pose: NDArray[np.float64], intrinsics: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Project points of the world into a camera.

    Args:
        coord: (N, 3) metres.
        pose: (4, 4) camera to world, a rigid motion.
        intrinsics: (3, 3) pixels.

    Returns:
        (N, 2) continuous column and row, NaN behind the camera, and (N,) depth in metres.
    """
    seen = (coord - pose[:3, 3]) @ pose[:3, :3]
    depth = seen[:, 2]
    place = seen @ intrinsics[:2].T
    with np.errstate(divide="ignore", invalid="ignore"):
        place = np.where(depth[:, None] > 0, place / depth[:, None], np.nan)
    return place, depth


def pixels_of(
    place: NDArray[np.float64], size: tuple[int, int]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which places (P, 2), columns and rows, lie in an image of (height, width), and the pixels.

    Returns:
        (P,) bool, and (P, 2) int64 column and row, 0 outside.
    """
    # Comparisons with NaN are false.
    inside: NDArray[np.bool_] = np.all((place >= 0) & (place < (size[1], size[0])), axis=1)
    return inside, np.where(inside[:, None], np.nan_to_num(place), 0).astype(np.int64)


def colours_at_depth(frame: RgbdFrame) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The image's colours (h, w, 3) at the pixels of the depth map, and where there are any."""
    height, width = frame.depth.shape
    same = np.allclose(frame.intrinsics, frame.depth_intrinsics)
    if frame.colour.shape[:2] == (height, width) and same:
        return frame.colour, np.ones((height, width), dtype=np.bool_)
    ray = back_project(np.ones((height, width), dtype=np.float32), frame.depth_intrinsics)
    place = ray.reshape(-1, 3) @ frame.intrinsics[:2].T
    inside, pixel = pixels_of(place, (frame.colour.shape[0], frame.colour.shape[1]))
    colours = frame.colour[pixel[:, 1], pixel[:, 0]]
    return colours.reshape(height, width, 3), inside.reshape(height, width)
