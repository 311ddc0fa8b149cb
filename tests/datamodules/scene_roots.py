"""Tiny scenes on disk in every layout; the top left pixel of each image tells scene and frame."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from datamodules.multiview.batch import MultiviewBatch

FOCAL = (0.9, 1.2, 0.5, 0.5)
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
# Arguments of MultiviewRays that these scenes have enough pixels and frames for.
SMALL: dict[str, Any] = {"image_size": 6, "context_views": (2, 2), "target_views": 3}


def picture(scene: int = 0, frame: int = 0, height: int = 6, width: int = 8) -> bytes:
    """A PNG of one colour: red 10 * scene, green 5 * frame, blue 77."""
    pixels = np.full((height, width, 3), (10 * scene, 5 * frame, 77), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def batches(loader: Any) -> list[MultiviewBatch]:  # noqa: ANN401 - of one pass
    return list(loader)


def pose(frame: int) -> NDArray[np.float64]:
    """Camera to world, OpenCV axes: moving along x and y, turning about y."""
    angle = 0.1 * frame
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(
        [
            [math.cos(angle), 0, math.sin(angle)],
            [0, 1, 0],
            [-math.sin(angle), 0, math.cos(angle)],
        ]
    )
    matrix[:3, 3] = (0.5 * frame, 0.1 * frame**2, 0.2)
    return matrix


def stored_scene(name: str, scene: int = 0, frames: int = 6, **size: int) -> dict[str, Any]:
    """A scene as RE10K chunks hold it."""
    rows = np.zeros((frames, 18), dtype=np.float32)
    rows[:, :4] = FOCAL
    for frame in range(frames):
        rows[frame, 6:] = np.linalg.inv(pose(frame))[:3].ravel()
    images = [picture(scene, frame, **size) for frame in range(frames)]
    return {
        "url": "",
        "timestamps": torch.arange(frames),
        "cameras": torch.from_numpy(rows),
        "images": [torch.tensor(list(image), dtype=torch.uint8) for image in images],
        "key": name,
    }


def write_chunks(folder: Path, scenes: dict[str, int], per_chunk: int = 2, **size: int) -> Path:
    """Chunks and index.json in a folder: scenes by name with their numbers of frames."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    items = list(scenes.items())
    for start in range(0, len(items), per_chunk):
        file = f"{start // per_chunk:06}.torch"
        part = items[start : start + per_chunk]
        torch.save(
            [
                stored_scene(name, start + place, frames, **size)
                for place, (name, frames) in enumerate(part)
            ],
            folder / file,
        )
        index.update({name: file for name, _ in part})
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def re10k_root(root: Path, train: int = 8, test: int = 3, frames: int = 6) -> Path:
    """Train and test chunks, and an evaluation index for the test scenes."""
    write_chunks(root / "train", {f"a{scene}": frames for scene in range(train)})
    write_chunks(root / "test", {f"b{scene}": frames for scene in range(test)})
    index = {f"b{scene}": {"context": [0, 4], "target": [2, 3]} for scene in range(test)}
    (root / "evaluation_index.json").write_text(json.dumps(index))
    return root


def write_capture(
    folder: Path,
    frames: int = 6,
    *,
    file: str = "transforms.json",
    images: str = "images",
    per_frame: dict[str, Any] | None = None,
    **top: Any,  # noqa: ANN401
) -> Path:
    """A transforms.json, frames in reverse order, with images of 8 x 6 pixels."""
    (folder / images).mkdir(parents=True, exist_ok=True)
    entries = []
    for frame in reversed(range(frames)):
        (folder / images / f"frame_{frame}.png").write_bytes(picture(0, frame))
        entry = {
            "file_path": f"images/frame_{frame}.png",
            "transform_matrix": (pose(frame) @ OPENGL).tolist(),
        }
        entries.append({**entry, **(per_frame or {})})
    stated = {"w": 8, "h": 6, "fl_x": 7.2, "fl_y": 7.2, "cx": 4.0, "cy": 3.0}
    (folder / file).write_text(json.dumps({**stated, **top, "frames": entries}))
    return folder
