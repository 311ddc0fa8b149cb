"""Pictures of point clouds: colours for features and classes, and a point renderer in numpy."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Every picture is drawn this much larger, then averaged, which smooths edges.
_OVERSAMPLING = 2
# Distance of the eye in perspective, in radii of the cloud.
_EYE = 3.0
# Hues this far apart stay distinct however many there are: the golden section of the circle.
_HUE_STEP = 0.6180339887498949


@dataclass(frozen=True)
class CloudView:
    """From where a cloud is looked at; z is up.

    Attributes:
        azimuth: Direction of the eye around z in degrees, 0 along +x, 90 along +y; None takes the
            open side, to which the low points lie from the high ones, so that walls hide little.
        elevation: Height of the eye above the horizon in degrees.
        perspective: Whether near points are larger; otherwise orthographic.
        shading: 0 .. 1, how much edges in depth are darkened.
    """

    azimuth: float | None = None
    elevation: float = 40.0
    perspective: bool = False
    shading: float = 0.5


def pca_colours(features: Tensor | NDArray[Any]) -> NDArray[np.uint8]:
    """Colours that show which features are alike: the three leading principal components as RGB.

    The sign of a component is that of its largest loading, so equal features give equal colours.

    Args:
        features: (N, C) finite numbers.

    Returns:
        (N, 3) bytes; the 1st to the 99th percentile of each component spans 0 .. 255.
    """
    rows = torch.as_tensor(features).detach().cpu().double()
    rows = rows - rows.mean(0)
    covariance = rows.T @ rows / max(1, len(rows))  # (C, C)
    loadings = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :3]  # (C, 3), leading first
    largest = loadings.abs().argmax(0)
    loadings = loadings * torch.sign(loadings.gather(0, largest[None]))
    components = (rows @ loadings).numpy()  # (N, 3)
    components = np.pad(components, ((0, 0), (0, 3 - components.shape[1])))
    low, high = np.percentile(components, [1, 99], axis=0)
    span = np.where(high - low > 1e-12 * (1 + np.abs(high)), high - low, 1.0)
    return _to_levels((components - low) / span)


def class_colours(count: int) -> NDArray[np.uint8]:
    """Colours (count, 3) of classes, bytes, told apart by hue and by lightness."""
    colours = []
    for number in range(count):
        lightness = (0.55, 0.72, 0.40)[number % 3]
        colours.append(colorsys.hls_to_rgb(0.58 + number * _HUE_STEP, lightness, 0.65))
    return _to_levels(np.array(colours).reshape(-1, 3))


def _to_levels(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Numbers in [0, 1], those outside clipped, as bytes."""
    levels: NDArray[np.uint8] = np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)
    return levels


def label_colours(labels: NDArray[np.int64], classes: int) -> NDArray[np.uint8]:
    """Colours (N, 3) of labels (N,) in -1 .. classes - 1; those ignored (-1) are grey."""
    palette = np.concatenate([class_colours(classes), [[150, 150, 150]]]).astype(np.uint8)
    chosen: NDArray[np.uint8] = palette[np.where(labels < 0, classes, labels)]
    return chosen


def draw_cloud(
    coord: NDArray[Any],
    colour: NDArray[Any],
    size: tuple[int, int] = (480, 360),
    view: CloudView = CloudView(),
) -> NDArray[np.uint8]:
    """Draw points as squares, the nearest on top, on white.

    Args:
        coord: (N, 3) finite, in any unit; the cloud fills the picture.
        colour: (N, 3) bytes, RGB.
        size: Width and height in pixels.
        view: Where it is looked at from.

    Returns:
        (height, width, 3) bytes.

    Raises:
        ValueError: If there are no points or not as many colours.
    """
    if not len(coord) or np.shape(coord) != np.shape(colour):
        raise ValueError(
            f"coord {np.shape(coord)}, colour {np.shape(colour)}: expected both (N, 3), N >= 1"
        )
    width, height = (side * _OVERSAMPLING for side in size)
    place, depth = _project(np.asarray(coord, dtype=np.float64), view)
    pixels = _fit(place, width, height)  # (N, 2)
    image = np.full((height * width, 3), 255, dtype=np.uint8)
    buffer = np.full(height * width, np.inf)
    order = np.argsort(-depth, kind="stable")
    side = _splat_side(len(coord), width, height)
    for target, points in _splats(pixels[order], side, width, height):
        # Of several writes to one pixel the last, nearest one stays.
        image[target], buffer[target] = np.asarray(colour)[order[points]], depth[order[points]]
    shaded = _shade(image.reshape(height, width, 3), buffer.reshape(height, width), view.shading)
    blocks = shaded.reshape(size[1], _OVERSAMPLING, size[0], _OVERSAMPLING, 3)
    return _to_levels(blocks.mean((1, 3)) / 255)


def _project(coord: NDArray[np.float64], view: CloudView) -> tuple[NDArray[Any], NDArray[Any]]:
    """Places (N, 2), x right and y down, and distances (N,) from the eye."""
    azimuth = _open_side(coord) if view.azimuth is None else np.radians(view.azimuth)
    elevation = np.radians(view.elevation)
    towards = np.array(
        [
            np.cos(elevation) * np.cos(azimuth),
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation),
        ]
    )
    right = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
    centred = coord - (coord.min(0) + coord.max(0)) / 2
    place = np.stack([centred @ right, -(centred @ np.cross(towards, right))], axis=1)
    distance = -(centred @ towards)
    if view.perspective:
        radius = max(float(np.linalg.norm(centred, axis=1).max()), 1e-9)
        distance = distance + _EYE * radius
        place = place / distance[:, None]
    return place, distance


def _open_side(coord: NDArray[np.float64]) -> float:
    """Direction around z, in radians, from the high points to the low ones."""
    low = coord[:, 2] <= (coord[:, 2].min() + coord[:, 2].max()) / 2
    if low.all():
        return 0.6
    x, y, _ = coord[low].mean(0) - coord[~low].mean(0)
    return float(np.arctan2(y, x))


def _fit(place: NDArray[Any], width: int, height: int) -> NDArray[np.int64]:
    """Places (N, 2) as pixels (column, row) that fill all but a margin of the picture."""
    low, high = place.min(0), place.max(0)
    span = np.maximum(high - low, 1e-12)
    scale = 0.94 * min(width / span[0], height / span[1])
    centre = np.array([width, height]) / 2
    pixels = np.floor((place - (low + high) / 2) * scale + centre)
    fitted: NDArray[np.int64] = np.clip(pixels, 0, np.array([width, height]) - 1).astype(np.int64)
    return fitted


def _splat_side(count: int, width: int, height: int) -> int:
    """Side of the squares in pixels with which points of a surface just close it."""
    return int(np.clip(round(1.3 * np.sqrt(width * height / count)), 2, 24))


def _splats(
    pixels: NDArray[np.int64], side: int, width: int, height: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pixels that squares around (N, 2) cover, and the point of each, in the order of points."""
    shifts = np.arange(side) - side // 2
    parts = []
    for start in range(0, len(pixels), 1 << 16):
        block = pixels[start : start + (1 << 16)]
        columns = block[:, 0, None, None] + shifts  # (n, 1, side)
        rows = block[:, 1, None, None] + shifts[:, None]  # (n, side, 1)
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        points = np.broadcast_to(np.arange(start, start + len(block))[:, None, None], inside.shape)
        parts.append(((rows * width + columns)[inside], points[inside]))
    return parts


def _shade(
    image: NDArray[np.uint8], depth: NDArray[np.float64], strength: float
) -> NDArray[np.float64]:
    """Darken pixels that lie behind their neighbours, so that shapes stand out."""
    seen = np.isfinite(depth)
    span = float(np.ptp(depth[seen])) or 1.0
    behind = np.zeros_like(depth)
    for axis in (0, 1):
        for step in (-_OVERSAMPLING, _OVERSAMPLING):
            neighbour = np.roll(depth, step, axis)
            nearer = np.where(seen & np.isfinite(neighbour), depth, 0) - np.where(
                seen & np.isfinite(neighbour), neighbour, 0
            )
            behind += np.clip(nearer / span, 0, 0.05)
    light = 1 - strength * np.clip(behind * 8, 0, 1)
    shaded: NDArray[np.float64] = image.astype(np.float64)
    shaded *= np.where(seen, light, 1.0)[:, :, None]
    return shaded
