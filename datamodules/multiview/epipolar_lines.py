"""Where the ray of one camera's pixel runs in another camera's picture.

Poses are camera to world 4 x 4 with OpenCV axes (x right, y down, z forward). Pixel coordinates
are (x, y), the first pixel's centre at (0.5, 0.5). Coordinates on the plane of depth 1 in front of
a camera are called normalised. Everything is float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_CURVE_POINTS = 256  # of a distorted line; a picture's diagonal in steps of some pixels
_BORDER_POINTS = 33  # along each side of a distorted picture, to find what it shows
_NEWTON_STEPS = 20  # ample: the error is squared in each step


class Camera(NamedTuple):
    """One posed camera.

    Attributes:
        pose: (4, 4) camera to world.
        intrinsics: (4,) fx, fy, cx, cy in pixels.
        distortion: (4,) OpenCV's k1, k2, p1, p2; zeros for a pinhole.
    """

    pose: Floats
    intrinsics: Floats
    distortion: Floats

    @property
    def is_distorted(self) -> bool:
        """Whether straight lines are seen as curves."""
        return bool(self.distortion.any())


def distort(normalised: Floats, distortion: Floats) -> Floats:
    """Apply OpenCV's lens distortion to normalised points (N, 2)."""
    k1, k2, p1, p2 = distortion
    x, y = normalised.T
    squared = x * x + y * y
    radial = 1 + squared * (k1 + k2 * squared)
    moved_x = x * radial + 2 * p1 * x * y + p2 * (squared + 2 * x * x)
    moved_y = y * radial + p1 * (squared + 2 * y * y) + 2 * p2 * x * y
    return np.stack((moved_x, moved_y), axis=1)


def undistort(distorted: Floats, distortion: Floats) -> Floats:
    """Invert ``distort`` by Newton's method, for points (N, 2) within the lens' field of view."""
    points = distorted.copy()
    for _ in range(_NEWTON_STEPS if distortion.any() else 0):
        error = distort(points, distortion) - distorted
        points -= np.linalg.solve(_distortion_slope(points, distortion), error[:, :, None])[:, :, 0]
    return points


def _distortion_slope(normalised: Floats, distortion: Floats) -> Floats:
    """Derivative (N, 2, 2) of ``distort`` at points (N, 2)."""
    k1, k2, p1, p2 = distortion
    x, y = normalised.T
    squared = x * x + y * y
    radial, slope = 1 + squared * (k1 + k2 * squared), 2 * (k1 + 2 * k2 * squared)
    cross = slope * x * y + 2 * p1 * x + 2 * p2 * y
    across = radial + slope * x * x + 2 * p1 * y + 6 * p2 * x
    down = radial + slope * y * y + 6 * p1 * y + 2 * p2 * x
    return np.stack((np.stack((across, cross), 1), np.stack((cross, down), 1)), 1)


def to_normalised(pixels: Floats, camera: Camera) -> Floats:
    """Normalised coordinates (N, 2) of the rays through pixel coordinates (N, 2)."""
    distorted = (pixels - camera.intrinsics[2:]) / camera.intrinsics[:2]
    return undistort(distorted, camera.distortion)


def to_pixels(normalised: Floats, camera: Camera) -> Floats:
    """Pixel coordinates (N, 2) of normalised points (N, 2)."""
    return distort(normalised, camera.distortion) * camera.intrinsics[:2] + camera.intrinsics[2:]


def epipolar_line(
    point: Floats, camera_a: Camera, camera_b: Camera, width: int, height: int
) -> list[Floats]:
    """Find where the ray through a pixel of view A runs in view B.

    Only what B sees is given: the part in front of it, on the far side of A's centre, and inside
    its picture. Cameras in the same place see a ray of each other as a single point.

    Args:
        point: (2,) pixel coordinates in view A.
        camera_a: camera of the pixel.
        camera_b: camera that sees the pixel's ray.
        width: of view B's picture in pixels.
        height: of view B's picture in pixels.

    Returns:
        Connected pieces (M, 2) of pixel coordinates in view B, from A's centre outwards. A pinhole
        gives one piece of two points, or none; a distorted lens may give several curves.

    Raises:
        ValueError: if view B's distortion has no inverse anywhere along the picture's border.
    """
    to_b = np.linalg.inv(camera_b.pose) @ camera_a.pose
    direction = to_b[:3, :3] @ np.append(to_normalised(point[None], camera_a)[0], 1)
    ends = _clip_ray(to_b[:3, 3], direction, _seen_region(camera_b, width, height))
    if ends is None:
        return []
    if not camera_b.is_distorted:
        return [to_pixels(ends, camera_b)]
    share = np.linspace(0, 1, _CURVE_POINTS)[:, None]
    curve = to_pixels(ends[0] + share * (ends[1] - ends[0]), camera_b)
    inside = np.all((curve >= 0) & (curve <= (width, height)), axis=1)
    runs = np.split(np.arange(len(curve)), np.flatnonzero(np.diff(inside)) + 1)
    return [curve[run] for run in runs if inside[run].all()]


def _seen_region(camera: Camera, width: int, height: int) -> Floats:
    """Smallest and largest normalised x and y (2, 2) that the picture shows."""
    along = np.linspace(0, 1, _BORDER_POINTS)
    zero = np.zeros_like(along)
    sides = [(along, zero), (along, zero + 1), (zero, along), (zero + 1, along)]
    border = np.concatenate([np.stack(side, 1) for side in sides]) * (width, height)
    seen = to_normalised(border, camera)
    sound = np.abs(to_pixels(seen, camera) - border).max(1) < 1e-3
    if not sound.any():
        raise ValueError(
            f"distortion={camera.distortion.tolist()}: no ray meets the border of the picture; "
            "expected OpenCV's k1, k2, p1, p2 of this lens"
        )
    return np.stack((seen[sound].min(0), seen[sound].max(0)))


def _clip_ray(start: Floats, direction: Floats, region: Floats) -> Floats | None:
    """Normalised ends (2, 2) of a ray's part that projects into a region, None if none does.

    The ray's points are (1 - s) start + s direction with s from 0 to 1, up to scale; being in front
    and inside each edge of the region is a linear condition on s, so nothing is ever divided by a
    vanishing depth.
    """
    (left, top), (right, bottom) = region
    edges = np.array([[1, 0, -left], [-1, 0, right], [0, 1, -top], [0, -1, bottom], [0, 0, 1]])
    length = np.linalg.norm(start)
    if length < 1e-9 * np.linalg.norm(direction):
        start = direction  # the same place: every point of the ray is seen in one direction
    first, last = 0.0, 1.0
    for at_start, at_end in zip(edges @ start, edges @ direction, strict=True):
        if at_start < 0 and at_end < 0:
            return None
        if at_start < 0:
            first = max(first, at_start / (at_start - at_end))
        elif at_end < 0:
            last = min(last, at_start / (at_start - at_end))
    if first > last:
        return None
    ends = np.stack([(1 - s) * start + s * direction for s in (first, last)])  # (2, 3)
    if ends[:, 2].min() <= 0:
        return None
    clipped: Floats = ends[:, :2] / ends[:, 2:]
    return clipped
