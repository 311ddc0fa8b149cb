"""Hugging Face parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datamodules.errors import DataError, SampleError
from datamodules.readers.parquet import open_hub, open_parquet
from tests.datamodules.fixture_types import MakeImage, WriteParquet


def test_files_of_all_splits(
    tmp_path: Path, make_image: MakeImage, write_parquet: WriteParquet
) -> None:
    images: list[Any] = [make_image(value) for value in range(6)]
    data = tmp_path / "data"
    write_parquet(data / "train-00000-of-00002.parquet", images[:2], [1, 0], ["cat", "dog"])
    write_parquet(data / "train-00001-of-00002.parquet", images[2:4], [0, 1], ["cat", "dog"])
    write_parquet(data / "validation-00000-of-00001.parquet", images[4:], [1, 1], ["cat", "dog"])
    readers = open_parquet(tmp_path)
    assert set(readers) == {"train", "val"}
    train = readers["train"]
    assert train.class_names == ("cat", "dog")
    assert [train.label(position) for position in range(4)] == [1, 0, 0, 1]
    assert [train.read(position) for position in range(4)] == images[:4]
    assert train.sample_id(3).endswith("train-00001-of-00002.parquet:row 1")
    assert len(readers["val"]) == 2


def test_split_named_by_the_folder(
    tmp_path: Path, make_image: MakeImage, write_parquet: WriteParquet
) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / "default" / split / "0000.parquet", [make_image()], [0])
    assert set(open_parquet(tmp_path)) == {"train", "test"}


def test_large_files_are_mapped_from_an_arrow_copy(
    tmp_path: Path,
    make_image: MakeImage,
    write_parquet: WriteParquet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datamodules.readers.parquet._IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images: list[Any] = [make_image(value) for value in range(4)]
    names = ["a", "b"]
    write_parquet(tmp_path / "d" / "train-0.parquet", images[:3], [0, 1, 0], names)
    write_parquet(tmp_path / "d" / "train-1.parquet", images[3:], [1], names)
    train = open_parquet(tmp_path / "d")["train"]
    assert [train.read(position) for position in range(4)] == images
    assert [train.label(position) for position in range(4)] == [0, 1, 0, 1]
    assert train.class_names == ("a", "b")


def test_without_class_names_labels_are_numbered(
    tmp_path: Path, make_image: MakeImage, write_parquet: WriteParquet
) -> None:
    file = write_parquet(tmp_path / "mine.parquet", [make_image()] * 2, [0, 2])
    assert open_parquet(file)["train"].class_names == ("0", "1", "2")


def test_an_unlabelled_test_split_is_left_out(
    tmp_path: Path, make_image: MakeImage, write_parquet: WriteParquet
) -> None:
    write_parquet(tmp_path / "train.parquet", [make_image()] * 2, [0, 1], ["a", "b"])
    write_parquet(tmp_path / "test.parquet", [make_image()] * 2, [-1, -1], ["a", "b"])
    assert set(open_parquet(tmp_path)) == {"train"}


@pytest.mark.parametrize(("label", "shown"), [(-1, "-1"), (2, "2"), (None, "null")])
def test_a_label_out_of_range_names_the_row(
    label: object, shown: str, tmp_path: Path, make_image: MakeImage, write_parquet: WriteParquet
) -> None:
    names = ["a", "b"]
    file = tmp_path / "train.parquet"
    if label == 2:
        write_parquet(file, [make_image()] * 3, [0, 1, 2], ["a", "b", "c"])
        _rename_classes(file, names)
    else:
        write_parquet(file, [make_image()] * 3, [0, 1, label], names)
    train = open_parquet(tmp_path)["train"]
    with pytest.raises(SampleError, match=rf"\.parquet:row 2: label {shown}, expected 0 \.\. 1"):
        train.label(2)


def _rename_classes(file: Path, names: list[str]) -> None:
    import json

    import pyarrow.parquet as pq

    table = pq.read_table(file)
    info = json.loads(table.schema.metadata[b"huggingface"])
    info["info"]["features"]["label"]["names"] = names
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), file)


@pytest.mark.parametrize(("labels", "kind"), [(["a", "b"], "string"), ([0.5, 1.0], "double")])
def test_labels_that_are_no_integers(
    labels: list[Any],
    kind: str,
    tmp_path: Path,
    make_image: MakeImage,
    write_parquet: WriteParquet,
) -> None:
    write_parquet(tmp_path / "train.parquet", [make_image()] * 2, labels)
    with pytest.raises(DataError, match=f"column label is {kind}, expected integers"):
        open_parquet(tmp_path)


def test_missing_bytes_name_the_row(
    tmp_path: Path, make_image: MakeImage, write_parquet: WriteParquet
) -> None:
    write_parquet(tmp_path / "train.parquet", [make_image(), None], [0, 0])
    with pytest.raises(SampleError, match="row 1: no image bytes in the row; embed the files"):
        open_parquet(tmp_path)["train"].read(1)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"img": [b""], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"no column image \(found: img, label\)"):
        open_parquet(tmp_path)
    pq.write_table(pa.table({"image": [b""], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="column image is binary, expected a struct"):
        open_parquet(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_cut_off_file_is_named(
    keep: float, tmp_path: Path, make_image: MakeImage, write_parquet: WriteParquet
) -> None:
    file = write_parquet(tmp_path / "train.parquet", [make_image()] * 20, [0] * 20)
    data = file.read_bytes()
    file.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    with pytest.raises(DataError, match=r"train\.parquet: not a readable parquet file .*copy it"):
        open_parquet(tmp_path)


def test_a_name_without_a_split_beside_others_is_an_error(
    tmp_path: Path, make_image: MakeImage, write_parquet: WriteParquet
) -> None:
    write_parquet(tmp_path / "train.parquet", [make_image()], [0])
    write_parquet(tmp_path / "extra.parquet", [make_image()], [0])
    with pytest.raises(DataError, match=r"extra\.parquet: no split in the name"):
        open_parquet(tmp_path)


def test_an_unreachable_hub_data_set_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(name: str) -> None:
        raise ConnectionError(f"Couldn't reach\n {name}")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(DataError, match=r"put its train\*\.parquet") as caught:
        open_hub("someone/pictures")
    assert "data.init_args.root=someone/pictures" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_data_set(
    tmp_path: Path,
    make_image: MakeImage,
    write_parquet: WriteParquet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    file = write_parquet(tmp_path / "x.parquet", [make_image(3)] * 2, [0, 1], ["a", "b"])
    found = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    splits = {"train": found, "validation": found, "extra": found}
    monkeypatch.setattr("datasets.load_dataset", lambda name: splits)
    readers = open_hub("someone/pictures")
    assert set(readers) == {"train", "val"}
    assert readers["train"].read(1) == make_image(3)
    assert readers["val"].sample_id(1) == "someone/pictures[validation]:row 1"
