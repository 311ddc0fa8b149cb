"""Text-image pairs: broken, hostile and missing files, and arguments that make no sense."""

from __future__ import annotations

import json
import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules.errors import DataError, SampleError
from datamodules.text_image.batch import TextImageBatch
from datamodules.text_image.detection import open_pairs
from tests.datamodules.caption_roots import (
    RAISE,
    SKIP,
    contents,
    encoded,
    json_lines,
    levels,
    members,
    numbered_folder,
    small,
)
from tests.datamodules.fixture_types import Fill, WriteTar


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    chunks = b""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data
        chunks += struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def quietly(batches: Iterable[TextImageBatch]) -> list[TextImageBatch]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(batches)


def test_a_truncated_shard(tmp_path: Path, write_tar: WriteTar) -> None:
    shard = write_tar(tmp_path / "train-0.tar", members(0, 4))
    write_tar(tmp_path / "train-1.tar", members(4, 4))
    shard.write_bytes(shard.read_bytes()[: 512 * 13])
    with pytest.raises(DataError, match=r"train-0\.tar: .* truncated"):
        open_pairs(tmp_path, "auto", None, RAISE)
    with pytest.warns(UserWarning, match=r"skipped the rest of .*train-0\.tar"):
        train = open_pairs(tmp_path, "auto", None, SKIP)["train"]
    assert [caption for _, caption in contents(train)] == [
        f"caption {n}" for n in (0, 1, 4, 5, 6, 7)
    ]


@pytest.mark.parametrize("name", ["../../evil.png", "/etc/evil.txt", "a/../../evil.json"])
def test_members_that_point_outside_are_refused(
    name: str, tmp_path: Path, write_tar: WriteTar
) -> None:
    shard = write_tar(tmp_path / "in/x.tar", members(0, 2) | {name: encoded(9)})
    for faults in (RAISE, SKIP):
        with pytest.raises(DataError, match=r"x\.tar: member .*evil.* points outside"):
            open_pairs(shard, "auto", None, faults)
    assert not list(tmp_path.rglob("evil*"))


def test_a_key_that_occurs_twice(tmp_path: Path, write_tar: WriteTar) -> None:
    shard = write_tar(tmp_path / "x.tar", members(0, 1) | {"000000.jpg": encoded(1, "JPEG")})
    with pytest.raises(DataError, match=r"x\.tar: key '000000' has a second image member"):
        open_pairs(shard, "auto", None, RAISE)


def test_broken_members_of_a_shard(tmp_path: Path, write_tar: WriteTar) -> None:
    shard = write_tar(
        tmp_path / "x.tar",
        {
            "a.png": encoded(0),
            "b.txt": b"text only",
            "c.png": encoded(0),
            "c.txt": b"caf\xe9",
            "d.png": encoded(0),
            "d.json": b"{broken",
            "e.png": encoded(0),
            "e.json": json.dumps({"caption": None, "text": 3}).encode(),
            "f.png": encoded(0),
            "f.txt": b"x" * (2**20 + 1),
            "g.png": encoded(0),
            "g.json": json.dumps({"caption": "\ud800"}).encode(),
            "h.png": encoded(0),
            "h.json": b"[" * 100_000,
        },
    )
    train = open_pairs(shard, "auto", None, RAISE)["train"]
    expected = {
        0: "x.tar:a: no caption; add",
        2: r"x.tar:c: caption is not UTF-8 \(byte 3 is 0xe9\)",
        3: "x.tar:d: no JSON",
        4: "x.tar:e: no caption; expected a text under caption",
        5: "x.tar:f: caption of 1048577 bytes",
        6: "x.tar:g: caption holds half of a surrogate pair",
        7: "x.tar:h: no JSON",
    }
    for position, message in expected.items():
        with pytest.raises(SampleError, match=message) as caught:
            train.caption(position)
        assert "\n" not in str(caught.value)
    with pytest.raises(SampleError, match=r"x.tar:b: no image; add"):
        train.read(1)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "link/secret.png", "i/../../x"])
def test_images_outside_the_root_are_not_read(name: str, tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, {"secret.png": encoded(9), "in/x.jsonl": json_lines({"image": name, "txt": ""})})
    (tmp_path / "in/link").symlink_to(tmp_path)
    train = open_pairs(tmp_path / "in", "auto", None, RAISE)["train"]
    with pytest.raises(SampleError, match=r"x\.jsonl:line 1: image .* leads out of") as caught:
        train.read(0)
    assert "data.init_args.image_root" in str(caught.value)
    structs = [{"bytes": None, "path": name}]
    pq.write_table(pa.table({"image": structs, "caption": [""]}), tmp_path / "in/x.parquet")
    rows = open_pairs(tmp_path / "in", "parquet", None, RAISE)["train"]
    with pytest.raises(SampleError, match=r"x\.parquet:row 0: image .* leads out of"):
        rows.read(0)


def test_broken_lines_of_json(tmp_path: Path, fill: Fill) -> None:
    text = b'{"image": "0.png", "txt": "good"}\n[1]\n{"txt": "x"}\n{"image": "gone.png"}\n\xff\n'
    text += b'{"image": "folder", "txt": ""}\n' + json_lines({"image": "x" * 2**20})
    fill(tmp_path, {"x.jsonl": text, "0.png": encoded(0), "folder/x": b""})
    train = open_pairs(tmp_path, "auto", None, RAISE)["train"]
    assert train.caption(0) == "good"
    for position, message in (
        (1, "line 2: expected a JSON object, found list"),
        (2, "line 3: no image; expected a path under"),
        (3, r"line 4: image .*gone\.png cannot be read \(No such file"),
        (4, "line 5: caption is not UTF-8"),
        (5, r"line 6: image .*folder is no regular file"),
        (6, "line 7: 1048590 bytes, at most"),
    ):
        with pytest.raises(SampleError, match=message) as caught:
            train.read(position)
        assert "\n" not in str(caught.value)
    with pytest.raises(SampleError, match="line 4: no caption"):
        train.caption(3)


def test_broken_parquet(tmp_path: Path) -> None:
    invalid = pa.array([b"caf\xe9", None], pa.binary()).view(pa.string())
    table = pa.table({"image": pa.array([None, encoded(0)], pa.binary()), "caption": invalid})
    pq.write_table(table, tmp_path / "x.parquet")
    train = open_pairs(tmp_path, "auto", None, RAISE)["train"]
    with pytest.raises(SampleError, match="row 0: caption is not UTF-8"):
        train.caption(0)
    with pytest.raises(SampleError, match=r"row 1: no caption \(null\)"):
        train.caption(1)
    with pytest.raises(SampleError, match="row 0: no image bytes in the row"):
        train.read(0)
    columns: dict[str, Any]
    for columns, message in (
        ({"image": [b""], "label": [1]}, "no column caption/text/txt/prompt"),
        ({"picture": [b""], "text": ["x"]}, "no column image"),
        ({"image": ["x"], "text": ["x"]}, "column image is string, expected bytes"),
        ({"image": [b""], "text": [["x"]]}, "column text is list.* expected text"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=rf"x\.parquet: {message}"):
            open_pairs(tmp_path, "auto", None, RAISE)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match=r"x\.parquet: not a readable parquet file"):
        open_pairs(tmp_path, "auto", None, RAISE)


@pytest.mark.parametrize(
    ("data", "message"), [(b"broken", "not a JPEG"), (bomb(), "3600000000 pixels|could be decomp")]
)
def test_a_broken_image_stops_with_its_name(
    data: bytes, message: str, tmp_path: Path, fill: Fill
) -> None:
    root = numbered_folder(fill, tmp_path, 6, n3=data)
    with pytest.raises(SampleError, match=f"line 4: cannot decode the image: .*({message})"):
        list(small(root, val_size=1).train_dataloader())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_pairs_are_skipped_and_counted(num_workers: int, tmp_path: Path, fill: Fill) -> None:
    root = numbered_folder(fill, tmp_path, 10, n3=b"broken", n4=b"")
    fill(root, {"test.jsonl": (root / "pairs.jsonl").read_bytes()})
    (root / "pairs.jsonl").rename(root / "train.jsonl")
    options = {"on_error": "skip", "num_workers": num_workers, "eval_batch_size": 5}
    data = small(root, max_skipped_share=0.2, **options)
    loader = data.test_dataloader()
    batches = quietly(loader)
    index = torch.cat([batch["index"] for batch in batches]).tolist()
    assert index == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9]
    assert [level for batch in batches for level in levels(batch["image"])] == index
    captions = [caption for batch in batches for caption in batch["caption"]]
    assert captions == [f"caption {n}" for n in index]
    split: Any = loader.dataset
    assert split.num_skipped == 2
    assert split.skipped_ids == [f"{root}/test.jsonl:line {n}" for n in (4, 5)]
    strict = small(root, max_skipped_share=0.1, **options)
    with pytest.raises(DataError, match=r"2 of 10 samples unusable, more than .*=0\.1"):
        quietly(strict.test_dataloader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size=0: must be >= 1"),
        ({"caption_dropout": 1.5}, r"caption_dropout=1\.5: must be 0 \.\. 1"),
        ({"max_skipped_share": -1}, "max_skipped_share=-1: must be"),
        ({"predict_count": 0}, "predict_count=0: must be >= 1"),
        ({"resampling": "nearest"}, "resampling=nearest: must be bicubic or lanczos"),
        ({"decode": False}, "decode=False: must be true without features"),
        ({"features": Path("/"), "random_flip": True}, "random_flip=True: must be false with"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*\(data\.init_args\."):
        small(None, **arguments)


def test_missing_files_and_splits(tmp_path: Path, fill: Fill, write_tar: WriteTar) -> None:
    for name in ("prompts", "features", "image_root"):
        with pytest.raises(FileNotFoundError, match=rf"data\.init_args\.{name}=/nowhere"):
            small(None, **{name: Path("/nowhere")})
    write_tar(tmp_path / "test.tar", members(0, 2))
    with pytest.raises(DataError, match=r"no training split \(found: test\)"):
        small(tmp_path).setup("fit")
    write_tar(tmp_path / "train.tar", {"README": b""})
    with pytest.raises(DataError, match="split train is empty"):
        small(tmp_path).setup("fit")
    root = numbered_folder(fill, tmp_path / "j", 3)
    with pytest.raises(ValueError, match="val_size=3: must be less than the 3 training pairs"):
        small(root, val_size=3).setup("fit")
