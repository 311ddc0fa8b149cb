"""A rendered room as RGB-D frames, and the capture folders that it would come in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.paired_2d3d.rgbd_frames import RgbdFrame
from datamodules.paired_2d3d.rooms import room_frames

SIZE = 48


def captured_frames(count: int = 3, extra: int = 0, seed: int = 0) -> list[RgbdFrame]:
    """Frames of a room whose depths are whole millimetres, as files hold them."""
    frames = room_frames(seed, "train", 0, SIZE, count, extra)
    return [replace(f, depth=np.rint(f.depth * 1000).astype(np.float32) / 1000) for f in frames]


def _write_images(folder: Path, frames: list[RgbdFrame]) -> None:
    for kind in ("color", "depth"):
        (folder / kind).mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame.colour).save(folder / "color" / f"{number}.png")
        levels = np.rint(frame.depth * 1000).astype(np.uint16)
        Image.fromarray(levels).save(folder / "depth" / f"{number}.png")


def write_nerfstudio(folder: Path, frames: list[RgbdFrame]) -> Path:
    """transforms.json with OpenGL axes."""
    _write_images(folder, frames)
    matrix = frames[0].intrinsics
    stated = {
        "fl_x": matrix[0, 0], "fl_y": matrix[1, 1], "cx": matrix[0, 2], "cy": matrix[1, 2],
        "w": SIZE, "h": SIZE,
        "frames": [
            {
                "file_path": f"color/{number}.png",
                "depth_file_path": f"depth/{number}.png",
                "transform_matrix": (frame.pose * [1, -1, -1, 1]).tolist(),
            }
            for number, frame in enumerate(frames)
        ],
    }  # fmt: skip
    (folder / "transforms.json").write_text(json.dumps(stated))
    return folder


def write_scannet(folder: Path, frames: list[RgbdFrame]) -> Path:
    """Folders as ScanNet's exporter writes them, pixel centres at whole numbers."""
    _write_images(folder, frames)
    (folder / "pose").mkdir()
    (folder / "intrinsic").mkdir()
    for number, frame in enumerate(frames):
        np.savetxt(folder / "pose" / f"{number}.txt", frame.pose)
    matrix = np.eye(4)
    matrix[:3, :3] = frames[0].intrinsics
    matrix[:2, 2] -= 0.5
    for name in ("intrinsic_color", "intrinsic_depth"):
        np.savetxt(folder / "intrinsic" / f"{name}.txt", matrix)
    np.savetxt(folder / "intrinsic" / "extrinsic_color.txt", np.eye(4))
    return folder
