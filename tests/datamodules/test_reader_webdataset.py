"""WebDataset tar shards."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest

from datamodules.errors import DataError
from datamodules.readers.tar_index import cache_file
from datamodules.readers.webdataset import expand_braces
from tests.datamodules.fixture_types import MakeImage, WriteTar
from tests.datamodules.shards import open_shards, samples


def test_shards_of_a_folder(tmp_path: Path, make_image: MakeImage, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "train-0000.tar", samples(make_image, 0, 4))
    write_tar(tmp_path / "train-0001.tar", samples(make_image, 4, 3))
    write_tar(tmp_path / "val-0000.tar", samples(make_image, 0, 2))
    readers = open_shards(tmp_path)
    train = readers["train"]
    assert [len(reader) for reader in readers.values()] == [7, 2]
    assert train.class_names == readers["val"].class_names == ("0", "1", "2")
    assert [train.label(position) for position in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [train.read(position) for position in range(7)] == [make_image(n) for n in range(7)]
    assert train.sample_id(4) == f"{tmp_path / 'train-0001.tar'}:000004"


def test_splits_named_by_sub_folders_and_class_names(
    tmp_path: Path, make_image: MakeImage, write_tar: WriteTar
) -> None:
    for split in ("train", "validation", "test"):
        write_tar(tmp_path / split / "0000.tar", samples(make_image, 0, 3))
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\nfish\n")
    readers = open_shards(tmp_path)
    assert set(readers) == {"train", "val", "test"}
    assert readers["val"].class_names == ("cat", "dog", "bird", "fish")


def test_labels_in_json_and_other_members(
    tmp_path: Path, make_image: MakeImage, write_tar: WriteTar
) -> None:
    members = {
        "./dir.v2/a.JPG": make_image(1, kind="JPEG"),
        "./dir.v2/a.json": json.dumps({"label": 2, "caption": "x"}).encode(),
        "./dir.v2/a.txt": b"caption",
        "./dir.v2/a.seg.png": b"another modality",
        "b.cls": b" 1\n",
        "b.jpeg": make_image(2, kind="JPEG"),
        "README": b"no sample",
    }
    train = open_shards(write_tar(tmp_path / "x.tar", members))["train"]
    assert [train.label(position) for position in range(2)] == [2, 1]
    assert train.read(0) == members["./dir.v2/a.JPG"]


def test_brace_patterns() -> None:
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    for pattern, message in (("{2..1}", "backwards"), ("{a,{b}}", "nested"), ("{a", "unbalanced")):
        with pytest.raises(ValueError, match=message):
            expand_braces(pattern)


def test_a_pattern_names_the_missing_shard(
    tmp_path: Path, make_image: MakeImage, write_tar: WriteTar
) -> None:
    for number in (0, 2):
        write_tar(tmp_path / f"train-{number:04d}.tar", samples(make_image, number, 1))
    pattern = tmp_path / "train-{0000..0002}.tar"
    with pytest.raises(DataError, match=r"train-0001\.tar: no such shard \(1 of 3"):
        open_shards(pattern)
    write_tar(tmp_path / "train-0001.tar", samples(make_image, 1, 1))
    train = open_shards(pattern)["train"]
    assert [train.read(position) for position in range(3)] == [make_image(n) for n in range(3)]


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_long_names_in_every_tar_dialect(
    tar_format: int, tmp_path: Path, make_image: MakeImage
) -> None:
    folder = "/".join(["long" * 10] * (3 if tar_format == tarfile.USTAR_FORMAT else 6))
    names = [f"{folder}/{'ä' if tar_format == tarfile.PAX_FORMAT else 'a'}{n}" for n in range(3)]
    with tarfile.open(tmp_path / "x.tar", "w", format=tar_format) as tar:
        for number, name in enumerate(names):
            for ending, data in (("png", make_image(number)), ("cls", b"0")):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    train = open_shards(tmp_path / "x.tar")["train"]
    assert [train.sample_id(n).partition(".tar:")[2] for n in range(3)] == names
    assert [train.read(n) for n in range(3)] == [make_image(n) for n in range(3)]


def test_the_index_is_cached_and_follows_changes(
    tmp_path: Path, make_image: MakeImage, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "x.tar", samples(make_image, 0, 3))
    first = open_shards(tmp_path)["train"]
    assert cache_file(shard).is_file()
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.readers.webdataset.build_index", None)
        again = open_shards(tmp_path)["train"]
    assert [again.read(n) for n in range(3)] == [first.read(n) for n in range(3)]
    assert [again.sample_id(n) for n in range(3)] == [first.sample_id(n) for n in range(3)]
    write_tar(shard, samples(make_image, 5, 4))
    assert [open_shards(tmp_path)["train"].read(n) for n in range(4)] == [
        make_image(n) for n in range(5, 9)
    ]


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_index_is_built_again(
    damage: bytes | None, tmp_path: Path, make_image: MakeImage, write_tar: WriteTar
) -> None:
    shard = write_tar(tmp_path / "x.tar", samples(make_image, 0, 3))
    open_shards(tmp_path)
    stored = cache_file(shard).read_bytes()
    cache_file(shard).write_bytes(stored[: len(stored) // 2] if damage is None else damage)
    assert open_shards(tmp_path)["train"].read(2) == make_image(2)


def test_an_unusable_cache_folder_is_no_error(
    tmp_path: Path, make_image: MakeImage, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    shard = write_tar(tmp_path / "x.tar", samples(make_image, 0, 3))
    assert len(open_shards(shard)["train"]) == 3


def test_more_shards_than_open_files(
    tmp_path: Path, make_image: MakeImage, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamodules.readers.webdataset._OPEN_FILES", 2)
    for number in range(5):
        write_tar(tmp_path / f"train-{number}.tar", samples(make_image, number, 1))
    train = open_shards(tmp_path)["train"]
    for number in (0, 1, 2, 3, 4, 1, 0):
        assert train.read(number) == make_image(number)
    assert len(train._open) == 2
    copy = pickle.loads(pickle.dumps(train))  # noqa: S301
    assert not copy._open
    assert copy.read(3) == make_image(3)
