"""Small sets of images with captions in every layout, for tests."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from datamodules.errors import FaultPolicy
from datamodules.text_image.pair_reader import PairReader
from datamodules.text_image.text_image import TextImagePairs
from tests.datamodules.fixture_types import Fill

RAISE = FaultPolicy("raise", 0.3)
SKIP = FaultPolicy("skip", 0.3)


def small(root: Path | None, **arguments: object) -> TextImagePairs:
    defaults: dict[str, Any] = {"image_size": 8, "val_size": 2, "batch_size": 4}
    return TextImagePairs(root, **(defaults | arguments))


def encoded(value: int, kind: str = "PNG") -> bytes:
    """An 8 x 8 image whose every channel is ``value``."""
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def members(first: int, count: int) -> dict[str, bytes]:
    """Tar members: image n is constant n, its caption is "caption n"."""
    found = {}
    for number in range(first, first + count):
        found[f"{number:06d}.png"] = encoded(number)
        found[f"{number:06d}.txt"] = f"caption {number}".encode()
    return found


def json_lines(*lines: object) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def numbered_folder(fill: Fill, root: Path, count: int, **replaced: bytes) -> Path:
    """A jsonl root: image n is constant n, its caption is "caption n"."""
    lines = [{"file_name": f"i/{n}.png", "text": f"caption {n}"} for n in range(count)]
    files = {f"i/{n}.png": encoded(n) for n in range(count)}
    files |= {f"i/{name.removeprefix('n')}.png": data for name, data in replaced.items()}
    return fill(root, {"pairs.jsonl": json_lines(*lines), **files})


def contents(reader: PairReader) -> list[tuple[bytes, str]]:
    return [(reader.read(n), reader.caption(n)) for n in range(len(reader))]


def levels(image: Tensor) -> list[int]:
    """The grey level of constant images."""
    found: list[int] = ((image[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()
    return found
