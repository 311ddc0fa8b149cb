"""Small data sets, made in the test."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.datamodules.fixture_types import Fill, FolderData, MakeImage, WriteParquet, WriteTar


@pytest.fixture(autouse=True)
def _own_cache_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def _make_image(value: int = 0, size: int = 8, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """An image whose every channel is ``value``, as an encoded file."""
    shape = (size, size) if mode == "L" else (size, size, len(mode))
    stream = io.BytesIO()
    Image.fromarray(np.full(shape, value, dtype=np.uint8), mode=None).save(stream, kind)
    return stream.getvalue()


def _write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _write_parquet(
    path: Path, images: list[bytes | None], labels: list[Any], names: list[str] | None = None
) -> Path:
    import datasets

    label: Any = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    if labels and isinstance(labels[0], str | float):
        label = datasets.Value("string" if isinstance(labels[0], str) else "float64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    rows = [data and {"bytes": data, "path": f"{row}.png"} for row, data in enumerate(images)]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features)
    with path.open("wb") as stream:
        table.to_parquet(stream)
    return path


def _fill(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def _folder_data(root: Path) -> Path:
    """20 images each of classes a and b; image n of class c is constant 100 * c + n."""
    return _fill(
        root,
        {
            f"train/{name}/{n:03d}.png": _make_image(100 * label + n)
            for label, name in enumerate("ab")
            for n in range(20)
        },
    )


@pytest.fixture
def fill() -> Fill:
    return _fill


@pytest.fixture
def folder_data() -> FolderData:
    return _folder_data


@pytest.fixture
def make_image() -> MakeImage:
    return _make_image


@pytest.fixture
def write_tar() -> WriteTar:
    return _write_tar


@pytest.fixture
def write_parquet() -> WriteParquet:
    return _write_parquet
