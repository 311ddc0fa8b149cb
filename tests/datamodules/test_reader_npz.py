"""Downsampled ImageNet in npz files."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from datamodules.errors import DataError, FaultPolicy, SampleError
from datamodules.readers.detection import open_splits
from datamodules.readers.npz import open_npz


def images(count: int, side: int = 4, channels: int = 3) -> NDArray[np.uint8]:
    shape = (count, side, side, channels)
    return np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)


def planar(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_chrabaszcz_batches(save: Callable[..., None], tmp_path: Path) -> None:
    pixels = images(33)
    labels = np.arange(33) % 5 + 1
    for batch in range(11):
        rows = slice(3 * batch, 3 * batch + 3)
        save(
            tmp_path / f"train_data_batch_{batch + 1}.npz",
            data=planar(pixels[rows]),
            labels=labels[rows],
            mean=np.zeros(48),
        )
    save(tmp_path / "val_data.npz", data=planar(images(4)), labels=np.array([1, 2, 3, 3]))
    readers = open_npz(tmp_path)
    train = readers["train"]
    assert train.class_names == readers["val"].class_names == ("1", "2", "3", "4", "5")
    assert [train.label(row) for row in range(33)] == (labels - 1).tolist()
    assert all(np.array_equal(train.read(row), pixels[row]) for row in range(33))
    assert train.sample_id(30).endswith("train_data_batch_11.npz:row 0")
    assert np.array_equal(readers["val"].read(3), images(4)[3])


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_plain_images(layout: str, tmp_path: Path) -> None:
    pixels = images(3, channels=1 if layout == "NHW" else 3)
    stored = {"NHWC": pixels, "NCHW": pixels.transpose(0, 3, 1, 2), "NHW": pixels[..., 0]}[layout]
    np.savez(tmp_path / "train.npz", images=stored, labels=np.array([0, 2, 1], dtype=np.uint8))
    train = open_npz(tmp_path / "train.npz")["train"]
    assert train.class_names == ("0", "1", "2")
    assert [train.label(row) for row in range(3)] == [0, 2, 1]
    assert all(np.array_equal(train.read(row), pixels[row]) for row in range(3))


def test_fortran_order_is_kept(tmp_path: Path) -> None:
    pixels = images(3)
    np.savez(tmp_path / "train.npz", images=np.asfortranarray(pixels))
    assert np.array_equal(open_npz(tmp_path)["train"].read(2), pixels[2])


def test_uncompressed_files_are_not_read_into_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images=images(3))
    train = open_npz(tmp_path)["train"]
    assert all(isinstance(array, np.memmap) for array in train._arrays())


def test_a_pickled_reader_maps_the_files_again(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images=images(200, side=32))
    train = open_npz(tmp_path)["train"]
    data = pickle.dumps(train)
    assert len(data) < 10_000
    assert np.array_equal(pickle.loads(data).read(7), train.read(7))  # noqa: S301


def test_without_labels_there_is_one_class(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images=images(2))
    train = open_npz(tmp_path)["train"]
    assert train.class_names == ("unlabelled",)
    assert train.label(1) == 0


def test_labels_from_zero_in_the_one_based_convention(tmp_path: Path) -> None:
    np.savez(tmp_path / "train_data.npz", data=planar(images(2)), labels=np.array([3, 0]))
    train = open_npz(tmp_path)["train"]
    with pytest.raises(SampleError, match=r"row 1: label 0, expected 1 \.\. 3"):
        train.label(1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data": np.zeros((2, 48), np.float32)}, "data is float32"),
        ({"data": np.zeros((2, 47), np.uint8)}, r"expected uint8 \(N, 3 \* S \* S\)"),
        ({"images": np.zeros((2, 4, 4, 2), np.uint8)}, r"\(2, 4, 4, 2\), expected uint8 \(N, H"),
        ({"images": images(2), "labels": np.zeros(3, np.int64)}, "3 labels for 2 images"),
        ({"images": images(2), "labels": np.zeros(2)}, "labels are float64"),
        ({"pictures": images(2)}, "found: pictures"),
    ],
)
def test_unexpected_arrays_are_named(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_npz(tmp_path)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["images", "labels"])
def test_pickled_arrays_are_refused_and_not_run(
    name: str, save: Callable[..., None], tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    arrays: dict[str, Any] = {"images": images(1), "labels": np.zeros(1, np.int64)}
    arrays[name] = np.array([Payload(marker)], dtype=object)
    save(tmp_path / "train.npz", **arrays)
    with pytest.raises(DataError, match=r"pickled Python objects.*numpy\.savez"):
        open_npz(tmp_path)
    assert not marker.exists()


def test_pickles_are_refused_with_the_remedy(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    file = tmp_path / "train_data_batch_1"
    file.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(DataError, match=r"train_data_batch_1: the pickle variant.*numpy\.savez"):
        open_splits(tmp_path, "auto", FaultPolicy())
    file.rename(tmp_path / "train_data_batch_1.npz")
    with pytest.raises(DataError, match="pickled Python objects"):
        open_splits(tmp_path, "auto", FaultPolicy())
    assert not marker.exists()


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "train.npz"
    np.savez(file, images=images(50))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"train\.npz: not a readable npz .*\(1000 bytes\)"):
        open_npz(tmp_path)
