"""What lies at a root."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datamodules.errors import DataError, FaultPolicy
from datamodules.readers.detection import detect, open_splits
from tests.datamodules.fixture_types import MakeImage


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.parquet", "parquet"),
        ("data/train-00000.parquet", "parquet"),
        ("default/train/0000.parquet", "parquet"),
        ("train-0000.tar", "webdataset"),
        ("train/0000.tar", "webdataset"),
        ("train_data_batch_1.npz", "npz"),
        ("cat/x.png", "folder"),
        ("train/cat/x.JPEG", "folder"),
        ("train/cat/images/x.jpg", "folder"),
        ("val/x.png", "folder"),
        ("x.png", "folder"),
        ("train_64x64/0000001.png", "folder"),
    ],
)
def test_layouts(name: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    assert detect(tmp_path) == expected


def test_single_files_patterns_and_hub_names(tmp_path: Path) -> None:
    for name, expected in (("a.parquet", "parquet"), ("a.tar", "webdataset"), ("a.npz", "npz")):
        (tmp_path / name).touch()
        assert detect(tmp_path / name) == expected
    assert detect(tmp_path / "train-{00..07}.tar") == "webdataset"
    assert detect(Path("someone/pictures")) == "parquet"


def test_several_layouts_are_ambiguous(tmp_path: Path, make_image: MakeImage) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/x.png").write_bytes(make_image())
    np.savez(tmp_path / "train.npz", images=np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(DataError, match=r"ambiguous, holds npz and folder; set data\.init_args\."):
        open_splits(tmp_path, "auto", FaultPolicy())
    assert len(open_splits(tmp_path, "folder", FaultPolicy())["train"]) == 1
    assert len(open_splits(tmp_path, "npz", FaultPolicy())["train"]) == 2


def test_nothing_found_lists_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    with pytest.raises(DataError, match=r"nothing found; looked for .*parquet.*folder.*npz"):
        detect(tmp_path)
    (tmp_path / "a.zip").touch()
    with pytest.raises(DataError, match=r"a\.zip: no such format; looked for"):
        detect(tmp_path / "a.zip")
    with pytest.raises(DataError, match="no webdataset files; looked for"):
        open_splits(tmp_path, "webdataset", FaultPolicy())
