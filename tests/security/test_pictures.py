"""Every reader of pictures names the one that cannot be decoded, in one line, and decodes none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.documents import DocumentsAndPhotographs
from datamodules.errors import DataError
from datamodules.imagenet import ImageNetPixels
from datamodules.multiview import MultiviewRays
from datamodules.paired_2d3d import PairedScenes
from datamodules.paired_2d3d.frame_folders import open_frames
from datamodules.text_image.text_image import TextImagePairs
from tests.datamodules.caption_roots import encoded
from tests.datamodules.paired_roots import paired_root
from tests.datamodules.rgbd_captures import captured_frames, write_nerfstudio
from tests.datamodules.scene_roots import re10k_root, stored_scene, write_capture
from tests.security.hostile_pictures import PICTURES

Reader = Callable[[Path, bytes], None]

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")

_VIEWS: dict[str, Any] = {"image_size": 6, "context_views": (2, 2), "target_views": 2}


def train(data: Any) -> None:  # noqa: ANN401 - any data module
    """Read an epoch."""
    data.setup("fit")
    list(data.train_dataloader())


def class_folders(root: Path, picture: bytes) -> None:
    for number in range(6):
        (root / f"train/a/{number}.png").parent.mkdir(parents=True, exist_ok=True)
        (root / f"train/a/{number}.png").write_bytes(encoded(number))
    (root / "train/a/3.png").write_bytes(picture)
    (root / "val/a").mkdir(parents=True)
    (root / "val/a/0.png").write_bytes(encoded(0))
    train(ImageNetPixels(root, image_size=8, channels=3, batch_size=2))


def flat_folder(root: Path, picture: bytes) -> None:
    for number in range(8):
        (root / f"{number}.png").write_bytes(picture if number < 7 else encoded(number))
    train(DocumentsAndPhotographs(root, image_size=8, patch_size=4, batch_size=2, val_size=1))


def captioned(root: Path, picture: bytes) -> None:
    lines = [{"file_name": f"{number}.png", "text": f"caption {number}"} for number in range(8)]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "val.jsonl").write_text(json.dumps({"file_name": "good.png", "text": ""}))
    for number in range(8):
        (root / f"{number}.png").write_bytes(picture)
    (root / "good.png").write_bytes(encoded(0))
    train(TextImagePairs(root, image_size=8, batch_size=4))


def chunks(root: Path, picture: bytes) -> None:
    re10k_root(root, train=2)
    scenes = [stored_scene("a0"), stored_scene("a1", 1)]
    scenes[1]["images"] = [torch.tensor(list(picture), dtype=torch.uint8)] * 6
    torch.save(scenes, root / "train/000000.torch")
    train(MultiviewRays(root, batch_size=2, cache_decoded_mb=0, **_VIEWS))


def capture(root: Path, picture: bytes) -> None:
    write_capture(root / "room", 8)
    for file in (root / "room/images").iterdir():
        file.write_bytes(picture)
    train(MultiviewRays(root, batch_size=1, cache_decoded_mb=0, **_VIEWS))


def capture_of_unstated_size(root: Path, picture: bytes) -> None:
    write_capture(root / "room", 8)
    file = root / "room/transforms.json"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in stated.items() if k not in ("w", "h")}))
    (root / "room/images/frame_3.png").write_bytes(picture)
    train(MultiviewRays(root, batch_size=1, cache_decoded_mb=0, **_VIEWS))


def rooms(root: Path, picture: bytes) -> None:
    paired_root(root, train=1, val=1, points=200)
    for file in (root / "images/train").rglob("*.png"):
        file.write_bytes(picture)
    train(PairedScenes(root, grid_size=0.1, patch_grid=(4, 4), patch_pixels=6, batch_size=1))


def depth(root: Path, picture: bytes) -> None:
    write_nerfstudio(root / "kitchen", captured_frames())
    (root / "kitchen/depth/1.png").write_bytes(picture)
    list(open_frames(root / "kitchen"))


def colour(root: Path, picture: bytes) -> None:
    write_nerfstudio(root / "kitchen", captured_frames())
    (root / "kitchen/color/1.png").write_bytes(picture)
    list(open_frames(root / "kitchen"))


READERS: dict[Reader, str] = {
    class_folders: "3.png",
    flat_folder: ".png",
    captioned: "train.jsonl:line 1",
    chunks: "scene a1",
    capture: "frame_",
    capture_of_unstated_size: "frame_",
    rooms: ".png",
    depth: "depth/1.png",
    colour: "color/1.png",
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("reader", READERS)
def test_picture_is_named(reader: Reader, picture: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        reader(tmp_path, PICTURES[picture])
    message = str(caught.value)
    assert READERS[reader] in message
    assert len(message.splitlines()) == 1
    assert len(message) < 500
