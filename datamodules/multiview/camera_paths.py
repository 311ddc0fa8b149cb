"""Camera paths to render in predict: between the context views, or from a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from datamodules.errors import DataError
from datamodules.multiview.collation import Sample, collate
from datamodules.multiview.poses import interpolate_poses, normalise_poses
from datamodules.multiview.view_source import SceneViews

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.multiview.batch import MultiviewBatch
    from datamodules.multiview.evaluation_index import Entry
    from datamodules.multiview.poses import PoseRule
    from datamodules.multiview.view_source import ViewSource

_OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


def read_path(file: Path) -> NDArray[np.float64]:
    """Read a camera path.

    Args:
        file: JSON {"frames": [{"transform_matrix": 4 x 4}]}, camera to world with OpenGL axes, as
            in a transforms.json, in the world of the scene.

    Returns:
        (T, 4, 4) poses with OpenCV axes.

    Raises:
        DataError: if the file is no such path.
    """
    try:
        frames = json.loads(file.read_bytes())["frames"]
        poses = np.array([frame["transform_matrix"] for frame in frames], dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f'{file}: cannot be read as a camera path ({error!r}); expected {{"frames": '
            '[{"transform_matrix": 4 x 4 numbers}, ...]}'
        ) from error
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not np.isfinite(poses).all():
        raise DataError(f"{file}: matrices of shape {poses.shape[1:]}; expected 4 x 4 numbers")
    path: NDArray[np.float64] = poses @ _OPENGL_TO_OPENCV
    return path


class CameraPaths(Dataset["MultiviewBatch"]):
    """Batches whose targets are the cameras of a path, with zero images and frame -1.

    The poses are normalised by the context cameras alone, so that the scene is encoded the same
    whatever the path. The path's cameras have the intrinsics of the context views, interpolated
    like their positions, or of the first one; they have no distortion.

    Args:
        source: the scenes.
        entries: scenes and context views.
        rule: how poses are normalised.
        path: (T, 4, 4) poses in the world of the scene; None goes through the context views.
        path_frames: cameras of a path through the context views.
    """

    def __init__(
        self,
        source: ViewSource,
        entries: Sequence[Entry],
        rule: PoseRule,
        *,
        path: NDArray[np.float64] | None = None,
        path_frames: int = 60,
    ) -> None:
        self._source = source
        self._entries = tuple(entries)
        self._rule: PoseRule = rule
        self._path = path
        self._path_frames = path_frames

    def __len__(self) -> int:
        """Number of paths."""
        return len(self._entries)

    def __getitem__(self, pair: tuple[int, int]) -> MultiviewBatch:
        """A batch of one path, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> MultiviewBatch:
        """The batch of the paths given as (index, epoch) pairs."""
        return collate([self._sample(index) for index, _ in pairs])

    def _sample(self, index: int) -> Sample:
        position, (frames, _) = self._entries[index]
        context = self._source.views(position, frames, self._source.cameras(position))
        path = self._path_views(context)
        normalised = normalise_poses(context.pose, path.pose, self._rule, target_scales=False)
        return Sample(
            context._replace(pose=normalised.context),
            path._replace(pose=normalised.target),
            index,
            self._source.reader.names[position],
            normalised.similarity,
        )

    def _path_views(self, context: SceneViews) -> SceneViews:
        if self._path is None:
            pose = interpolate_poses(context.pose, self._path_frames)
            place = np.linspace(0, len(context.pose) - 1, self._path_frames)
            known = np.arange(len(context.pose))
            columns = [np.interp(place, known, column) for column in context.intrinsics.T]
            intrinsics = np.stack(columns, axis=1)  # (T, 4)
        else:
            pose = self._path
            intrinsics = np.repeat(context.intrinsics[:1], len(pose), axis=0)
        count = len(pose)
        return SceneViews(
            pixels=np.zeros((count, *context.pixels.shape[1:]), dtype=np.uint8),
            pose=pose,
            intrinsics=intrinsics,
            distortion=np.zeros((count, 4)),
            frame=np.full(count, -1, dtype=np.int64),
        )
