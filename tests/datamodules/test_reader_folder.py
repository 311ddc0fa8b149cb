"""Folders of images."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.errors import DataError, SampleError
from datamodules.readers.folder import open_folder
from tests.datamodules.fixture_types import MakeImage


def fill(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


@pytest.mark.parametrize("val", ["val", "validation"])
def test_train_and_val(val: str, tmp_path: Path, make_image: MakeImage) -> None:
    files = {
        "train/n02/b.JPEG": make_image(2, kind="JPEG"),
        "train/n02/a.png": make_image(1),
        "train/n01/deep/c.jpg": make_image(3, kind="JPEG"),
        "train/n01/notes.txt": b"no image",
        "train/n01/._hidden.png": b"no image",
        "train/.cache/x.png": b"no image",
        f"{val}/n01/d.png": make_image(4),
        f"{val}/n02/e.png": make_image(5),
        "test/n01/f.png": make_image(6),
        "test/n02/g.png": make_image(7),
    }
    fill(tmp_path, files)
    readers = open_folder(tmp_path)
    assert set(readers) == {"train", "val", "test"}
    train = readers["train"]
    assert train.class_names == readers["val"].class_names == ("n01", "n02")
    assert [train.label(position) for position in range(len(train))] == [0, 1, 1]
    ids = [train.sample_id(position) for position in range(3)]
    expected = ["train/n01/deep/c.jpg", "train/n02/a.png", "train/n02/b.JPEG"]
    assert ids == [str(tmp_path / name) for name in expected]
    assert [train.read(position) for position in range(3)] == [files[name] for name in expected]


def test_class_folders_at_the_root_are_training_data(tmp_path: Path, make_image: MakeImage) -> None:
    fill(tmp_path, {"ä é/x.png": make_image(1), "b/y.png": make_image(2)})
    readers = open_folder(tmp_path)
    assert set(readers) == {"train"}
    assert readers["train"].class_names == ("b", "ä é")
    assert readers["train"].read(1) == make_image(1)


def test_a_flat_validation_folder_is_explained(tmp_path: Path, make_image: MakeImage) -> None:
    fill(tmp_path, {"train/a/x.png": make_image(), "val/ILSVRC2012_val_00000001.png": make_image()})
    with pytest.raises(DataError, match=r"val: images lie directly in the folder.*one sub-folder"):
        open_folder(tmp_path)


def test_an_empty_class_folder_is_named(tmp_path: Path, make_image: MakeImage) -> None:
    fill(tmp_path, {"train/a/x.png": make_image(), "train/b/readme.txt": b""})
    with pytest.raises(DataError, match="b: class folder without images"):
        open_folder(tmp_path)


def test_two_validation_folders_are_refused(tmp_path: Path, make_image: MakeImage) -> None:
    fill(tmp_path, {f"{name}/a/x.png": make_image() for name in ("train", "val", "validation")})
    with pytest.raises(DataError, match="second folder for split val"):
        open_folder(tmp_path)


def test_unlabelled_downsampled_imagenet(tmp_path: Path, make_image: MakeImage) -> None:
    files = {f"train_64x64/{n:07d}.png": make_image(n) for n in (2, 1, 3)}
    fill(tmp_path, files | {"valid_64x64/0000001.png": make_image(9)})
    readers = open_folder(tmp_path)
    assert set(readers) == {"train", "val"}
    train = readers["train"]
    assert train.class_names == ("unlabelled",)
    assert [train.read(position) for position in range(3)] == [make_image(n) for n in (1, 2, 3)]
    assert {train.label(position) for position in range(3)} == {0}


def test_a_file_that_vanished_is_named(tmp_path: Path, make_image: MakeImage) -> None:
    fill(tmp_path, {"a/x.png": make_image()})
    train = open_folder(tmp_path)["train"]
    (tmp_path / "a/x.png").unlink()
    with pytest.raises(SampleError, match=r"x\.png: cannot be read \(No such file"):
        train.read(0)


def test_fingerprint_follows_names_and_contents(tmp_path: Path, make_image: MakeImage) -> None:
    fill(tmp_path, {"a/x.png": make_image(1), "a/y.png": make_image(2)})
    before = open_folder(tmp_path)["train"].fingerprint
    assert open_folder(tmp_path)["train"].fingerprint == before
    fill(tmp_path, {"a/y.png": make_image(3)})
    changed = open_folder(tmp_path)["train"].fingerprint
    (tmp_path / "a/y.png").rename(tmp_path / "a/z.png")
    assert len({before, changed, open_folder(tmp_path)["train"].fingerprint}) == 3
