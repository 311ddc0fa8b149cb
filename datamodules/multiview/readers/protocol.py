"""What a reader of scenes is: cameras of a scene, and encoded images of chosen frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from datamodules.errors import SampleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SceneSplit = Literal["train", "val", "test", "all"]
"""Splits of the scenes at a root; "all" where it does not say."""


@dataclass(frozen=True)
class Cameras:
    """Cameras of the F frames of a scene.

    Attributes:
        pose: (F, 4, 4) float64, camera to world, OpenCV axes.
        intrinsics: (F, 4) float64, fx / W, fy / H, cx / W, cy / H of a W x H image.
        distortion: (F, 4) float64, OpenCV's k1, k2, p1, p2.
        size: (F, 2) int64, height and width for which the intrinsics were stated; 0 if unknown.
        held_out: (F,) bool, frames that the data set keeps for testing.
    """

    pose: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    distortion: NDArray[np.float64]
    size: NDArray[np.int64]
    held_out: NDArray[np.bool_]

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.pose)


def check_cameras(cameras: Cameras, place: str) -> Cameras:
    """Make sure that poses are rigid motions and focal lengths positive.

    Args:
        cameras: as read.
        place: file, and scene where it holds several, for messages.

    Returns:
        The cameras.

    Raises:
        SampleError: one line naming the first bad frame.
    """
    turn, focal = cameras.pose[:, :3, :3], cameras.intrinsics[:, :2]
    finite = np.isfinite(cameras.pose).all((1, 2)) & np.isfinite(cameras.intrinsics).all(1)
    with np.errstate(all="ignore"):
        product = turn @ turn.transpose(0, 2, 1)
        rigid = (np.abs(product - np.eye(3)).max((1, 2)) < 1e-2) & (np.linalg.det(turn) > 0)
    for good, problem in (
        (finite & np.isfinite(cameras.distortion).all(1), "a camera that is not finite"),
        (rigid, "a pose that is no rotation and translation"),
        ((focal > 0).all(1), "a focal length that is not positive"),
    ):
        if not good.all():
            frame = int(np.flatnonzero(~good)[0])
            raise SampleError(f"{place}: frame {frame} has {problem}; correct or remove it")
    return cameras


class SceneReader(Protocol):
    """Random access to the scenes of one split on disk; safe to use after a fork and to pickle."""

    @property
    def names(self) -> Sequence[str]:
        """Name of every scene."""
        ...

    @property
    def fingerprint(self) -> str:
        """Text that changes when the files do, found without reading all of them."""
        ...

    def __len__(self) -> int:
        """Number of scenes."""
        ...

    def num_frames(self, position: int) -> int:
        """Frames of a scene.

        Raises:
            SampleError: if the scene cannot be read.
        """
        ...

    def cameras(self, position: int) -> Cameras:
        """Cameras of all frames of a scene.

        Raises:
            SampleError: if they cannot be read or used.
        """
        ...

    def image(self, position: int, frame: int) -> bytes:
        """Encoded image of a frame.

        Raises:
            SampleError: if it cannot be read.
        """
        ...

    def frame_id(self, position: int, frame: int) -> str:
        """File, and scene and frame where it holds several, for messages."""
        ...
