"""Procedural scenes in the RE10K layout: chunk files of scenes with JPEG bytes, and an index.

A chunk is a list of dicts: url (str), timestamps (int64, n), cameras (float32, n x 18: fx/W, fy/H,
cx/W, cy/H, 0, 0, then world to camera 3 x 4 row by row), images (n uint8 tensors of JPEG bytes)
and key (str).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datamodules.multiview.procedural_render import pixel_intrinsics, render_views
from datamodules.multiview.procedural_scene import (
    CONTEXT_FRAMES,
    TARGET_FRAMES,
    VIEWS,
    sample_scenes,
)
from datamodules.multiview.procedural_textures import Split, build_atlas, tile_texels

# At 32 x 32, 99 without chroma subsampling stays 47 dB from the exact picture; 98 gives 43.6 dB.
JPEG_QUALITY = 99
SCENES_PER_CHUNK = 64

_THREADS = 4  # at most; the time goes into torch operations, which run side by side


class Job(NamedTuple):
    """One chunk to be written.

    Attributes:
        split: of the scenes.
        first: number of the first scene.
        last: one past the last.
    """

    split: Split
    first: int
    last: int

    @property
    def file(self) -> str:
        """Name of the chunk file in the split's folder."""
        return f"{self.first // SCENES_PER_CHUNK:06d}.torch"


def scene_key(split: Split, number: int) -> str:
    """Name of a scene in the index, such as procedural-test-000007."""
    return f"procedural-{split}-{number:06d}"


def encode_scene(
    split: Split, number: int, seed: int, image_size: int, atlas: Tensor
) -> dict[str, Any]:
    """Render one scene and pack it as an entry of a chunk.

    Args:
        split: "train" or "test".
        number: of the scene.
        seed: of the data set.
        image_size: pixels along a side.
        atlas: (3, 256, T, T) textures of the split.
    """
    scenes, poses = sample_scenes(seed, split, [number])
    pictures = render_views(scenes, poses, atlas, image_size)[0]  # (V, 3, H, W)
    levels = pictures.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)  # (V, H, W, 3)
    return {
        "url": "procedural",
        "timestamps": torch.arange(VIEWS),
        "cameras": camera_rows(poses[0]),
        "images": [_jpeg(picture) for picture in levels],
        "key": scene_key(split, number),
    }


def camera_rows(poses: Tensor) -> Tensor:
    """RE10K camera rows (V, 18) of poses (V, 4, 4), camera to world."""
    world_to_camera = torch.linalg.inv(poses.double())[:, :3].flatten(1)  # (V, 12)
    head = torch.cat((pixel_intrinsics(1), torch.zeros(2))).expand(len(poses), 6)
    return torch.cat((head, world_to_camera.float()), dim=1)


def write_layout(
    folder: Path, image_size: int, scenes: dict[Split, int], seed: int
) -> Iterator[int]:
    """Write all chunks and indices below a folder.

    Args:
        folder: exists and is empty.
        image_size: pixels along a side.
        scenes: number of scenes of each split.
        seed: of the data set.

    Yields:
        The number of scenes of every chunk that was written.
    """
    texels = tile_texels(image_size)
    atlases = {split: build_atlas(split, seed, texels) for split in scenes}
    for split, count in scenes.items():
        (folder / split).mkdir()
        index = {key: job.file for job in _jobs(split, count) for key in _keys(job)}
        (folder / split / "index.json").write_text(json.dumps(index))
    entry = {"context": list(CONTEXT_FRAMES), "target": list(TARGET_FRAMES)}
    evaluation = {scene_key("test", number): entry for number in range(scenes["test"])}
    (folder / "evaluation_index.json").write_text(json.dumps(evaluation))

    def write(job: Job) -> int:
        numbers = range(job.first, job.last)
        atlas = atlases[job.split]
        chunk = [encode_scene(job.split, n, seed, image_size, atlas) for n in numbers]
        torch.save(chunk, folder / job.split / job.file)
        return len(chunk)

    jobs = [job for split, count in scenes.items() for job in _jobs(split, count)]
    pool = ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0))))
    try:
        yield from pool.map(write, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs(split: Split, count: int) -> list[Job]:
    starts = range(0, count, SCENES_PER_CHUNK)
    return [Job(split, start, min(start + SCENES_PER_CHUNK, count)) for start in starts]


def _keys(job: Job) -> list[str]:
    return [scene_key(job.split, number) for number in range(job.first, job.last)]


def _jpeg(levels: Tensor) -> Tensor:
    """JPEG file of a picture (H, W, 3) uint8, as a tensor of its bytes."""
    from PIL import Image

    stream = io.BytesIO()
    picture = Image.fromarray(levels.contiguous().numpy())
    picture.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return torch.frombuffer(stream.getbuffer(), dtype=torch.uint8).clone()
