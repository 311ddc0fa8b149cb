"""Global and local views of a cloud (arXiv 2510.23607, appendix; as released).

A view is the given number of points nearest to its centre. The principal global view lies around
what all photographs saw, the second one around a point of it, the local views around points of it
that no earlier local view holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.paired_2d3d.colour_augmentation import augment_colour
from datamodules.paired_2d3d.geometry_augmentation import augment_geometry
from datamodules.paired_2d3d.point_arrays import squared_distances

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.paired_2d3d.view_options import ViewOptions


class Cloud(NamedTuple):
    """Points of a scene.

    Attributes:
        coord: (N, 3) float32 metres.
        colour: (N, 3) float32 in [0, 1]; zeros where not known.
        normal: (N, 3) float32 of length 1; zeros where not known.
    """

    coord: NDArray[np.float32]
    colour: NDArray[np.float32]
    normal: NDArray[np.float32]

    def take(self, rows: NDArray[np.int64]) -> Cloud:
        """Some of the points."""
        return Cloud(*(values.take(rows, axis=0) for values in self))


class View(NamedTuple):
    """Augmented points of one view.

    Attributes:
        rows: (n,) int64, of the cloud, ascending.
        coord: (n, 3) float32 metres, augmented.
        origin_coord: (n, 3) float32 metres, as in the cloud.
        colour: (n, 3) float32 in [0, 1], augmented.
        normal: (n, 3) float32, augmented.
    """

    rows: NDArray[np.int64]
    coord: NDArray[np.float32]
    origin_coord: NDArray[np.float32]
    colour: NDArray[np.float32]
    normal: NDArray[np.float32]


class ChosenRows(NamedTuple):
    """Points of every view of an item.

    Attributes:
        global_: rows (n,) of the principal and the second global view.
        local: rows (n,) of each local view.
        images: (V',) int64, photographs that saw a point of the principal view.
    """

    global_: tuple[NDArray[np.int64], NDArray[np.int64]]
    local: tuple[NDArray[np.int64], ...]
    images: NDArray[np.int64]


def nearest_rows(
    coord: NDArray[np.float32], centre: NDArray[np.float32], count: int
) -> NDArray[np.int64]:
    """Rows (count,) of the points nearest to a centre, ascending; ties go to the first rows."""
    if count >= len(coord):
        return np.arange(len(coord), dtype=np.int64)
    distance = squared_distances(coord, centre)
    reach = np.partition(distance, count - 1)[count - 1]
    is_inside = distance < reach
    ties = np.flatnonzero(distance == reach)
    is_inside[ties[: count - int(is_inside.sum())]] = True
    return np.flatnonzero(is_inside)


def choose_rows(
    coord: NDArray[np.float32],
    visible: NDArray[np.bool_],
    options: ViewOptions,
    max_points: int,
    generator: np.random.Generator,
) -> ChosenRows:
    """Draw the points of all views.

    Args:
        coord: (N, 3) metres, N >= 1.
        visible: (N, V) whether a photograph saw a point; V may be 0.
        options: shares and number of views.
        max_points: most points of a view.
        generator: keyed by the sample.
    """
    most = min(max_points, len(coord))
    principal = nearest_rows(coord, _principal_centre(coord, visible, generator), most)
    centre = coord[principal[generator.integers(len(principal))]]
    second = nearest_rows(coord, centre, _draw_size(options.global_share, most, generator))
    is_left = np.zeros(len(coord), dtype=bool)  # none, so that all of the principal view is next
    local = []
    for _ in range(options.local_views):
        left = principal[is_left[principal]]
        if len(left) == 0:
            is_left[principal] = True
            left = principal
        centre = coord[left[generator.integers(len(left))]]
        rows = nearest_rows(coord, centre, _draw_size(options.local_share, most, generator))
        is_left[rows] = False
        local.append(rows)
    is_seen = [column.take(principal).any() for column in visible.T]
    images = np.flatnonzero(np.array(is_seen, dtype=bool))
    return ChosenRows((principal, second), tuple(local), images)


def _principal_centre(
    coord: NDArray[np.float32], visible: NDArray[np.bool_], generator: np.random.Generator
) -> NDArray[np.float32]:
    """Mean of what all photographs saw; a random point if there is none."""
    drawn = int(generator.integers(len(coord)))
    seen = np.full(len(coord), visible.shape[1] > 0)
    for column in visible.T:
        seen &= column
    points = coord[seen] if seen.any() else coord[drawn : drawn + 1]
    centre: NDArray[np.float32] = points.mean(axis=0, dtype=np.float64).astype(np.float32)
    return centre


def _draw_size(share: tuple[float, float], most: int, generator: np.random.Generator) -> int:
    """Number of points of a view, at least 1."""
    return max(1, int(generator.uniform(*share) * most))


def make_views(
    cloud: Cloud, chosen: ChosenRows, options: ViewOptions, generator: np.random.Generator
) -> tuple[list[View], list[View]]:
    """Augment the chosen points.

    Args:
        cloud: its colours are changed once for the global views, anew for each local view.
        chosen: points of every view.
        options: what is changed, and how much.
        generator: keyed by the sample.

    Returns:
        Global and local views.
    """
    colour = augment_colour(cloud.colour, options, generator)
    global_views = [
        _make_view(cloud, rows, colour.take(rows, axis=0), options, generator)
        for rows in chosen.global_
    ]
    local_views = []
    for rows in chosen.local:
        own = augment_colour(cloud.colour.take(rows, axis=0), options, generator)
        local_views.append(_make_view(cloud, rows, own, options, generator))
    return global_views, local_views


def _make_view(
    cloud: Cloud,
    rows: NDArray[np.int64],
    colour: NDArray[np.float32],
    options: ViewOptions,
    generator: np.random.Generator,
) -> View:
    origin_coord, normal = cloud.coord.take(rows, axis=0), cloud.normal.take(rows, axis=0)
    coord, normal = augment_geometry(origin_coord, normal, options, generator)
    return View(rows, coord, origin_coord, colour, normal)
