"""A picture that checks cameras: pixels of one view, and their epipolar lines in the others.

If poses and intrinsics are right, each coloured line runs through the thing that lies under the
dot of its colour. Wrong axes, an inverted pose or a wrong scale of the intrinsics show at once.
Draw it for any data set by ``python -m datamodules.multiview.epipolar --root ROOT``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import DataError
from datamodules.multiview.epipolar_lines import Camera, epipolar_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from torch import Tensor

    from datamodules.multiview.batch import Views
    from datamodules.multiview.epipolar_lines import Floats

# Okabe and Ito's colours, told apart by readers with any colour vision.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
# Places of the marked pixels as shares of width and height, spread over the picture.
PLACES = ((0.5, 0.5), (0.2, 0.25), (0.8, 0.25), (0.2, 0.75), (0.8, 0.75), (0.5, 0.15), (0.5, 0.85))

_LEAST_SIDE = 256  # smaller pictures are enlarged, so that lines leave something to see
_GAP = 4


def draw_epipolar(
    image_a: Tensor,
    image_b: Tensor,
    pose_a: Tensor,
    pose_b: Tensor,
    intrinsics_a: Tensor,
    intrinsics_b: Tensor,
    points: Tensor,
    distortion_a: Tensor | None = None,
    distortion_b: Tensor | None = None,
) -> Image:
    """Draw pixels of view A as dots, and beside it their epipolar lines in view B.

    Args:
        image_a: (3, H, W) in [0, 1].
        image_b: (3, H', W') in [0, 1].
        pose_a: (4, 4) camera to world, OpenCV axes.
        pose_b: (4, 4).
        intrinsics_a: (4,) fx, fy, cx, cy in pixels.
        intrinsics_b: (4,).
        points: (N, 2) pixel coordinates x, y in view A, the first pixel's centre at (0.5, 0.5).
        distortion_a: (4,) OpenCV's k1, k2, p1, p2; None is a pinhole.
        distortion_b: (4,); None is a pinhole. The lines are curves otherwise.

    Returns:
        Both pictures side by side, enlarged by a whole factor if they are small.
    """
    camera_a = _camera(pose_a, intrinsics_a, distortion_a)
    camera_b = _camera(pose_b, intrinsics_b, distortion_b)
    marked = points.double().cpu().numpy()
    pictures = [_draw_dots(image_a, marked), _draw_lines(image_b, marked, camera_a, camera_b)]
    return _in_a_row(pictures)


def draw_epipolar_row(views: Views, scene: int = 0) -> Image:
    """Draw seven pixels of a scene's first view, and their epipolar lines in its other views.

    Args:
        views: such as the context views of a batch; padded views are left out.
        scene: position in the batch.

    Raises:
        ValueError: if the scene has fewer than two views, so that there is nothing to compare.
    """
    used = views["valid"][scene].nonzero().flatten().tolist()
    if len(used) < 2:
        raise ValueError(f"scene {scene} of the batch has {len(used)} view(s): expected at least 2")
    images = views["image"][scene]
    cameras = [
        _camera(
            views["pose"][scene, v], views["intrinsics"][scene, v], views["distortion"][scene, v]
        )
        for v in used
    ]
    height, width = images.shape[-2:]
    # The centre of the pixel at each place: a dot then marks one pixel of a small picture.
    marked = np.floor(np.array(PLACES) * (width, height)) + 0.5
    pictures = [_draw_dots(images[used[0]], marked)]
    for view, camera in zip(used[1:], cameras[1:], strict=True):
        pictures.append(_draw_lines(images[view], marked, cameras[0], camera))
    return _in_a_row(pictures)


def _camera(pose: Tensor, intrinsics: Tensor, distortion: Tensor | None) -> Camera:
    lens = np.zeros(4) if distortion is None else distortion.double().cpu().numpy()
    return Camera(pose.double().cpu().numpy(), intrinsics.double().cpu().numpy(), lens)


def _enlarged(image: Tensor) -> tuple[Image, int]:
    """A picture (3, H, W) in [0, 1] for drawing on, and its factor of enlargement."""
    from PIL import Image

    levels = image.detach().float().clamp(0, 1).mul(255).round().byte()
    picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())
    factor = max(-(-_LEAST_SIDE // max(picture.size)), 1)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST), factor


def _draw_dots(image: Tensor, points: Floats) -> Image:
    from PIL import ImageDraw

    picture, factor = _enlarged(image)
    canvas = ImageDraw.Draw(picture)
    for number, (x, y) in enumerate(points * factor):
        canvas.circle((x, y), 5, fill=_colour(number), outline="black")
    return picture


def _draw_lines(image: Tensor, points: Floats, camera_a: Camera, camera_b: Camera) -> Image:
    from PIL import ImageDraw

    height, width = image.shape[-2:]
    picture, factor = _enlarged(image)
    canvas = ImageDraw.Draw(picture)
    for number, point in enumerate(points):
        for piece in epipolar_line(point, camera_a, camera_b, width, height):
            _draw_piece(canvas, piece * factor, _colour(number))
    return picture


def _draw_piece(canvas: ImageDraw, piece: Floats, colour: str) -> None:
    """Draw one connected piece (M, 2), with a dark rim; a dot if it is a single point."""
    if np.ptp(piece, axis=0).max() < 1:
        canvas.circle(tuple(piece[0]), 4, fill=colour, outline="black")
        return
    corners = [(float(x), float(y)) for x, y in piece]
    canvas.line(corners, fill="black", width=4, joint="curve")
    canvas.line(corners, fill=colour, width=2, joint="curve")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _in_a_row(pictures: list[Image]) -> Image:
    from PIL import Image

    width = sum(picture.width for picture in pictures) + _GAP * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + _GAP
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the context views of a scene of the evaluation; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.multiview.epipolar",
        description="Draw epipolar lines between the context views of a scene, to check cameras.",
    )
    parser.add_argument("--root", type=Path, help="data; without it the procedural scenes")
    parser.add_argument("--scene", help="name of a scene; the first of the evaluation by default")
    parser.add_argument("--image-size", type=int, default=256, help="side of a view in pixels")
    parser.add_argument("--out", type=Path, default=Path("epipolar.png"), help="picture to write")
    options = parser.parse_args(arguments)
    try:
        views = _context_views(options.root, options.scene, options.image_size)
        picture = draw_epipolar_row(views)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(options.out)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    print(options.out)


def _context_views(root: Path | None, scene: str | None, image_size: int) -> Views:
    """Context views of one scene of the evaluation, by its name or the first."""
    from datamodules.multiview.multiview import MultiviewRays

    data = MultiviewRays(
        root=root,
        image_size=image_size,
        eval_batch_size=1,
        cache_decoded_mb=0,
        procedural_scenes=(1, 48),
    )
    data.setup("test")
    for batch in data.test_dataloader():
        if scene is None or batch["scene"][0] == scene:
            context: Views = batch["context"]
            return context
    raise DataError(f"--scene {scene}: no such scene in the evaluation of {root or 'the data'}")


if __name__ == "__main__":
    main()
