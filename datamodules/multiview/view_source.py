"""Pixels and cameras of frames at the size that is trained on, decoded once if they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.progress import track

from datamodules.errors import SampleError
from datamodules.multiview.image_fit import ImageFit, decode_view
from datamodules.multiview.readers.protocol import Cameras

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.multiview.readers.protocol import SceneReader

_LONG_DECODING = 5000


class SceneViews(NamedTuple):
    """V views of one scene.

    Attributes:
        pixels: (V, H, W, 3) uint8.
        pose: (V, 4, 4) float64, camera to world, OpenCV axes.
        intrinsics: (V, 4) float64, fx, fy, cx, cy in pixels of the H x W image.
        distortion: (V, 4) float64, k1, k2, p1, p2.
        frame: (V,) int64, position in the scene; -1 for a camera that took no photograph.
    """

    pixels: NDArray[np.uint8]
    pose: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    distortion: NDArray[np.float64]
    frame: NDArray[np.int64]

    def take(self, rows: slice | NDArray[np.int64]) -> SceneViews:
        """Some of the views."""
        return SceneViews(
            self.pixels[rows],
            self.pose[rows],
            self.intrinsics[rows],
            self.distortion[rows],
            self.frame[rows],
        )


class ViewSource:
    """Views of a reader's scenes.

    Args:
        reader: where the scenes are.
        fit: size of the views.
        cache_bytes: all frames are decoded once and kept if they need no more memory than this.

    Raises:
        SampleError: if a frame to be kept is unusable.
    """

    def __init__(self, reader: SceneReader, fit: ImageFit, cache_bytes: int) -> None:
        self.reader = reader
        self.fit = fit
        self._kept: list[tuple[Cameras, SceneViews]] = []
        if self._fits(cache_bytes):
            self._keep_all()

    def _fits(self, cache_bytes: int) -> bool:
        """Whether all frames fit; opens no more scenes than it takes to know."""
        left = cache_bytes // (self.fit.height * self.fit.width * 3)
        if left < 2 * len(self.reader):
            return False
        for position in range(len(self.reader)):
            left -= self.reader.num_frames(position)
            if left < 0:
                return False
        return True

    def _keep_all(self) -> None:
        counts = [self.reader.num_frames(position) for position in range(len(self.reader))]
        # One array for all, so that the pages of a forked process stay shared.
        pixels = np.empty((sum(counts), self.fit.height, self.fit.width, 3), dtype=np.uint8)
        ends = np.cumsum(counts).tolist()
        shown = track(range(len(counts)), "decoding views", transient=True)
        for position in shown if ends[-1] >= _LONG_DECODING else range(len(counts)):
            cameras = self.reader.cameras(position)
            views = self._decode(position, range(len(cameras)), cameras)
            place = slice(ends[position] - counts[position], ends[position])
            pixels[place] = views.pixels
            self._kept.append((cameras, views._replace(pixels=pixels[place])))

    def cameras(self, position: int) -> Cameras:
        """Cameras of all frames of a scene; SampleError if they cannot be used."""
        return self._kept[position][0] if self._kept else self.reader.cameras(position)

    def views(self, position: int, frames: Sequence[int], cameras: Cameras) -> SceneViews:
        """Chosen frames of a scene.

        Args:
            position: of the scene in the reader.
            frames: V positions, repeated ones included.
            cameras: of the scene.

        Raises:
            SampleError: naming the file, if an image cannot be read or does not fit its camera.
        """
        if self._kept:
            return self._kept[position][1].take(np.array(frames, dtype=np.int64))
        return self._decode(position, frames, cameras)

    def _decode(self, position: int, frames: Sequence[int], cameras: Cameras) -> SceneViews:
        rows = np.array(frames, dtype=np.int64)
        shape = (len(rows), self.fit.height, self.fit.width, 3)
        pixels, intrinsics = np.empty(shape, dtype=np.uint8), np.empty((len(rows), 4))
        decoded: dict[int, int] = {}
        for row, frame in enumerate(rows.tolist()):
            if frame in decoded:
                pixels[row], intrinsics[row] = pixels[decoded[frame]], intrinsics[decoded[frame]]
                continue
            pixels[row], intrinsics[row] = self._decode_frame(position, frame, cameras)
            decoded[frame] = row
        return SceneViews(pixels, cameras.pose[rows], intrinsics, cameras.distortion[rows], rows)

    def _decode_frame(
        self, position: int, frame: int, cameras: Cameras
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        place = self.reader.frame_id(position, frame)
        try:
            image = decode_view(self.reader.image(position, frame))
        except SampleError:
            raise
        except ValueError as error:
            raise SampleError(f"{place}: {error}") from error
        height, width = cameras.size[frame].tolist()
        # Smaller copies are rounded to whole pixels, so their aspect differs by that much.
        if height and abs(image.width * height - image.height * width) > max(height, width):
            raise SampleError(
                f"{place}: {image.width} x {image.height} pixels, but its camera was stated for "
                f"{width} x {height}; use the images that the cameras were made for, or copies of "
                "the same aspect"
            )
        intrinsics = self.fit.intrinsics(cameras.intrinsics[frame], image.height, image.width)
        return self.fit.pixels(image), intrinsics
