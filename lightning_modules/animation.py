"""Frames of a camera path as files: PNG pictures, a GIF, and an mp4 where an encoder is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_modules.pictures import to_pil, write_png
from lightning_modules.whole_files import whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

HOW_TO_GET_MP4 = "no mp4 beside the GIF: pip install imageio-ffmpeg (or the extra video) for one"
_QUALITY = 8  # of imageio-ffmpeg's 1 .. 10


def write_animation(folder: Path, frames: Tensor, frames_per_second: float) -> bool:
    """Write ``frame-0000.png`` and on, ``path.gif`` and ``path.mp4``.

    What an earlier, longer path left in the folder is removed.

    Args:
        folder: Made if it is not there.
        frames: (T, 3, H, W) in [0, 1], T >= 1.
        frames_per_second: Speed of the animations.

    Returns:
        Whether there is an mp4; without imageio-ffmpeg there is none.

    Raises:
        ValueError: ``frames_per_second`` is out of range.
        OSError: A file cannot be written.
    """
    check_speed(frames_per_second)
    pictures = [to_pil(frame) for frame in frames.float().cpu() * 2 - 1]
    for number, picture in enumerate(pictures):
        write_png(picture, folder / f"frame-{number:04d}.png")
    for surplus in folder.glob("frame-*.png"):
        if int(surplus.stem.removeprefix("frame-")) >= len(pictures):
            surplus.unlink()
    _write_gif(pictures, folder / "path.gif", frames_per_second)
    (folder / "path.mp4").unlink(missing_ok=True)
    return _write_mp4(pictures, folder / "path.mp4", frames_per_second)


def check_speed(frames_per_second: float) -> None:
    """Raise ``ValueError`` unless a GIF can be as fast as that."""
    if not 0 < frames_per_second <= 50:
        raise ValueError(f"frames_per_second={frames_per_second}: must be in (0, 50], as in GIF")


def _write_gif(pictures: Sequence[Image], path: Path, frames_per_second: float) -> None:
    first, *others = pictures
    duration = round(1000 / frames_per_second)
    options: dict[str, Any] = {"append_images": others, "duration": duration, "loop": 0}
    with whole_file(path) as temporary:
        first.save(temporary, "GIF", save_all=True, **options)


def _write_mp4(pictures: Sequence[Image], path: Path, frames_per_second: float) -> bool:
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # no package, or a package without a program
        return False
    # The program tells the format by the ending.
    temporary = path.with_name(f".{os.getpid()}.partial{path.suffix}")
    try:
        arrays = [_even(np.asarray(picture.convert("RGB"))) for picture in pictures]
        height, width = arrays[0].shape[:2]
        options = {"fps": frames_per_second, "quality": _QUALITY, "macro_block_size": 1}
        video = imageio_ffmpeg.write_frames(str(temporary), (width, height), **options)
        video.send(None)
        for array in arrays:
            video.send(array)
        video.close()
        os.replace(temporary, path)
    except OSError as error:
        reason = " ".join(str(error).split())[-160:]
        raise OSError(f"{path}: cannot be encoded ({reason}); the GIF is written") from None
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _even(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels (H, W, 3) with an odd last row or column doubled, as mp4 has even sides only."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return np.ascontiguousarray(padded)
