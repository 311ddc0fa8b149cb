"""WebDataset tar shards that are damaged, incomplete or hostile."""

from __future__ import annotations

import contextlib
import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest

from datamodules.errors import DataError, FaultPolicy, SampleError
from datamodules.readers.webdataset import open_webdataset
from tests.datamodules.fixture_types import MakeImage, WriteTar
from tests.datamodules.shards import open_shards, samples


@pytest.mark.parametrize(
    "name", ["../../evil.png", "a/../../evil.png", "/etc/evil.png", "..\\evil.png"]
)
def test_names_that_point_outside_are_refused(
    name: str, tmp_path: Path, make_image: MakeImage, write_tar: WriteTar
) -> None:
    shard = write_tar(tmp_path / "in/x.tar", samples(make_image, 0, 1) | {name: make_image()})
    for on_error in ("raise", "skip"):
        with pytest.raises(DataError, match=r"x\.tar: member .*evil\.png' points outside"):
            open_shards(shard, on_error)
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.BLKTYPE, "block device"),
        (tarfile.FIFOTYPE, "named pipe"),
        (tarfile.GNUTYPE_SPARSE, "sparse file"),
        (b"Z", "of type b'Z'"),
    ],
)
def test_members_that_are_no_files_are_refused(kind: bytes, what: str, tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = kind, "/etc/passwd"
    (tmp_path / "x.tar").write_bytes(info.tobuf() + bytes(1024))
    with pytest.raises(DataError, match=f"member 'a.png' is a {what}; refused"):
        open_shards(tmp_path / "x.tar")


def test_a_header_that_claims_ten_gigabytes_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.size = 10 * 2**30
    (tmp_path / "x.tar").write_bytes(info.tobuf() + bytes(4096))
    with pytest.raises(DataError, match=r"member 'a\.png' claims 10737418240 bytes"):
        open_shards(tmp_path / "x.tar")


def test_a_negative_size_is_refused(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a.png").tobuf())
    header[124:136] = b"\xff" * 11 + b"\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(4096))
    with pytest.raises(DataError, match="claims -256 bytes"):
        open_shards(tmp_path / "x.tar")


def test_an_oversized_extended_header_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 3 * 2**20
    (tmp_path / "x.tar").write_bytes(info.tobuf() + bytes(info.size + 1024))
    with pytest.raises(DataError, match="extended header of 3145728 bytes"):
        open_shards(tmp_path / "x.tar")


@pytest.mark.parametrize("records", [b"9 path=a", b"0 x=y\n", b"99999 size=x\n", b"12 size=many\n"])
def test_damaged_extended_headers_are_refused_or_ignored(
    records: bytes, tmp_path: Path, make_image: MakeImage
) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    data = info.tobuf() + records.ljust(512, b"\0") + tarfile.TarInfo("a.png").tobuf()
    (tmp_path / "x.tar").write_bytes(data + bytes(1024))
    # DataError or not, but never another exception or an endless loop.
    with contextlib.suppress(DataError):
        assert len(open_shards(tmp_path / "x.tar")["train"]) <= 1


@pytest.mark.parametrize("cut", [100, 512, 700, 1024, 1100, 2048, 3000])
def test_a_truncated_shard_is_named(
    cut: int, tmp_path: Path, make_image: MakeImage, write_tar: WriteTar
) -> None:
    shard = write_tar(tmp_path / "train-0000.tar", samples(make_image, 0, 5))
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train-0000\.tar: .*(truncated|copy it again)"):
        open_shards(tmp_path)


def test_damage_in_the_middle_is_not_taken_for_the_end(
    tmp_path: Path, make_image: MakeImage, write_tar: WriteTar
) -> None:
    shard = write_tar(tmp_path / "train-0000.tar", samples(make_image, 0, 5))
    data = bytearray(shard.read_bytes())
    data[2048:2060] = b"x" * 12
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError, match="no tar header at byte 2048"):
        open_shards(tmp_path)


def test_a_truncated_shard_may_be_skipped_up_to_the_cap(
    tmp_path: Path, make_image: MakeImage, write_tar: WriteTar
) -> None:
    for number in range(4):
        write_tar(tmp_path / f"train-{number}.tar", samples(make_image, number, 10))
    shard = tmp_path / "train-2.tar"
    shard.write_bytes(shard.read_bytes()[:6000])
    with pytest.warns(UserWarning, match=r"skipped the rest of .*train-2\.tar"):
        train = open_shards(tmp_path, "skip")["train"]
    assert 30 < len(train) < 40
    assert all(train.label(n) in (0, 1, 2) for n in range(len(train)))
    with pytest.raises(DataError, match=r"samples are lost in 1 damaged of 4 shards.*=0\.01"):
        open_webdataset(tmp_path, FaultPolicy("skip"))


def test_a_compressed_shard_gets_a_hint(
    tmp_path: Path, make_image: MakeImage, write_tar: WriteTar
) -> None:
    shard = write_tar(tmp_path / "train-0000.tar", samples(make_image, 0, 40))
    shard.write_bytes(gzip.compress(shard.read_bytes() * 3 + np.random.default_rng(0).bytes(4096)))
    with pytest.raises(DataError, match="compressed; unpack it"):
        open_shards(tmp_path)


def test_duplicate_keys_are_named(tmp_path: Path, make_image: MakeImage) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.png", "a.cls", "a.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match=r"key 'a' has a second image member \('a\.jpg'\)"):
        open_shards(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.png", "a.cls", "a.cls"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match="key 'a' has a second cls member"):
        open_shards(tmp_path / "x.tar")


def test_a_key_without_an_image_is_named(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "x.tar", {"a.cls": b"0"})
    with pytest.raises(DataError, match="key 'a' has no image"):
        open_shards(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "no label; add a member with the ending cls or json"),
        ({"b.cls": b"cat"}, "no integer label"),
        ({"b.cls": b"1.5"}, "no integer label"),
        ({"b.cls": b"-1"}, "no integer label"),
        ({"b.cls": b"\xff"}, "no integer label"),
        ({"b.cls": b"9" * 5000}, "no integer label"),
        ({"b.json": b"{"}, "no integer label"),
        ({"b.json": b"[" * 100_000}, "no integer label"),
        ({"b.json": b'{"label": true}'}, "no integer label"),
        ({"b.json": b'{"label": "1"}'}, "no integer label"),
        ({"b.json": b'{"caption": "x"}'}, "no integer label"),
        ({"b.json": b" " * (2**20 + 1)}, "no integer label"),
    ],
)
def test_labels_that_are_missing_or_wrong_name_shard_and_key(
    members: dict[str, bytes],
    message: str,
    tmp_path: Path,
    make_image: MakeImage,
    write_tar: WriteTar,
) -> None:
    good = {"a.png": make_image(), "a.cls": b"0", "b.png": make_image()}
    train = open_shards(write_tar(tmp_path / "x.tar", good | members))["train"]
    assert train.label(0) == 0
    with pytest.raises(SampleError, match=rf"x\.tar:b: {message}"):
        train.label(1)


def test_a_label_beyond_the_named_classes(
    tmp_path: Path, make_image: MakeImage, write_tar: WriteTar
) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    write_tar(tmp_path / "x.tar", samples(make_image, 0, 3))
    with pytest.raises(SampleError, match=r"label 2, expected 0 \.\. 1"):
        open_shards(tmp_path)["train"].label(2)


def test_a_shard_cut_off_after_indexing_is_a_bad_sample(
    tmp_path: Path, make_image: MakeImage, write_tar: WriteTar
) -> None:
    shard = write_tar(tmp_path / "x.tar", samples(make_image, 0, 3))
    train = open_shards(shard)["train"]
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(SampleError, match=r"x\.tar:000002: the shard was cut off"):
        train.read(2)
