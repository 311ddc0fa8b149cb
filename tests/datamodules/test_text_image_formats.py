"""Text-image pairs: every layout on disk, and how it is told from the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from datamodules.errors import DataError
from datamodules.keyed_random import keyed_generator
from datamodules.text_image.detection import detect, open_pairs
from datamodules.text_image.square_crop import square_crop
from datamodules.text_image.text_image import TextImagePairs
from tests.datamodules.caption_roots import RAISE, contents, encoded, json_lines, members, small
from tests.datamodules.fixture_types import Fill, WriteTar


def write_rows(path: Path, columns: dict[str, list[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_tar_shards(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "train-0000.tar", members(0, 3))
    write_tar(tmp_path / "train-0001.tar", members(3, 2))
    write_tar(tmp_path / "val-0000.tar", members(5, 1))
    for root in (tmp_path, tmp_path):  # the second time from the cached index
        readers = open_pairs(root, "auto", None, RAISE)
        assert contents(readers["train"]) == [(encoded(n), f"caption {n}") for n in range(5)]
        assert contents(readers["val"]) == [(encoded(5), "caption 5")]
    assert readers["train"].key(3) == "000003"
    assert readers["train"].sample_id(3) == f"{tmp_path / 'train-0001.tar'}:000003"
    pattern = tmp_path / "train-{0000..0001}.tar"
    assert len(open_pairs(pattern, "auto", None, RAISE)["train"]) == 5


def test_mixed_endings_in_a_shard(tmp_path: Path, write_tar: WriteTar) -> None:
    shard = write_tar(
        tmp_path / "x.tar",
        {
            "./dir.v2/a.JPG": encoded(1, "JPEG"),
            "./dir.v2/a.txt": "a kettle, ünïcode".encode(),
            "./dir.v2/a.json": json.dumps({"caption": "another"}).encode(),
            "./dir.v2/a.seg.png": b"another modality",
            "b.json": json.dumps({"width": 8, "text": "b"}).encode(),
            "b.webp": encoded(2, "WEBP"),
            "c.jpeg": encoded(3, "JPEG"),
            "c.json": json.dumps({"prompt": ""}).encode(),
            "d.png": encoded(4),
            "d.txt": b"\xef\xbb\xbfd\n",
            "README": b"no pair",
        },
    )
    train = open_pairs(shard, "auto", None, RAISE)["train"]
    assert [train.caption(n) for n in range(4)] == ["a kettle, ünïcode", "b", "", "d\n"]
    assert [train.key(n) for n in range(4)] == ["dir.v2/a", "b", "c", "d"]
    batch = next(iter(small(shard, val_size=1).val_dataloader()))
    assert batch["image"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("column", ["caption", "text", "txt"])
def test_parquet_with_bytes_or_structs(column: str, tmp_path: Path) -> None:
    images: list[Any] = [encoded(n) for n in range(3)]
    captions = ["zero", "one", ""]
    write_rows(tmp_path / "a/train.parquet", {"image": images, column: captions})
    structs = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(images)]
    write_rows(tmp_path / "b/train.parquet", {"image": structs, column: captions})
    plain = open_pairs(tmp_path / "a", "auto", None, RAISE)["train"]
    named = open_pairs(tmp_path / "b", "auto", None, RAISE)["train"]
    assert contents(plain) == contents(named) == list(zip(images, captions, strict=True))
    assert [plain.key(1), named.key(1)] == ["row 1", "1.png"]
    assert plain.sample_id(2) == f"{tmp_path / 'a/train.parquet'}:row 2"


def test_parquet_that_names_files_and_is_mapped(
    tmp_path: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamodules.readers.parquet._IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    fill(tmp_path / "in", {"images/x.png": encoded(7)})
    structs = [{"bytes": None, "path": "images/x.png"}, {"bytes": encoded(8), "path": None}]
    write_rows(tmp_path / "in/train.parquet", {"image": structs, "caption": ["x", "y"]})
    train = open_pairs(tmp_path / "in", "auto", None, RAISE)["train"]
    assert contents(train) == [(encoded(7), "x"), (encoded(8), "y")]


def test_categories_are_named_in_all_splits_alike(tmp_path: Path) -> None:
    for split, names in (("train", ["b", "a", None, "c"]), ("test", ["c", "d", "b"])):
        images = [encoded(n) for n in range(len(names))]
        columns = {"image": images, "caption": [""] * len(names), "category": names}
        write_rows(tmp_path / f"{split}.parquet", columns)
    data = small(tmp_path)
    assert data.category_names == ("a", "b", "c")
    assert next(iter(data.train_eval_dataloader()))["category"].tolist() == [1, 0, -1, 2]
    assert next(iter(data.test_dataloader()))["category"].tolist() == [2, -1, 1]


def test_lines_of_json(tmp_path: Path, fill: Fill) -> None:
    lines = (
        {"image": "a/0.png", "caption": "zero"},
        {"img_path": "a/1.png", "text": "one"},
        {"file_name": "./a/2.png", "txt": ""},
    )
    images = {f"pictures/a/{n}.png": encoded(n) for n in range(3)}
    text = json_lines(lines[0]) + b"\n" + json_lines(*lines[1:]).rstrip()
    fill(tmp_path, {"lists/pairs.jsonl": text, **images})
    expected = [(encoded(0), "zero"), (encoded(1), "one"), (encoded(2), "")]
    for root in (tmp_path / "lists", tmp_path / "lists/pairs.jsonl"):
        train = open_pairs(root, "auto", tmp_path / "pictures", RAISE)["train"]
        assert contents(train) == expected
    assert train.sample_id(1) == f"{tmp_path / 'lists/pairs.jsonl'}:line 3"
    assert train.key(1) == "a/1.png"


def test_image_folders_with_metadata(tmp_path: Path, fill: Fill) -> None:
    for split, number in (("train", 1), ("validation", 2)):
        line = json_lines({"file_name": f"{number}.png", "text": split})
        fill(
            tmp_path / split,
            {"metadata.jsonl": line, f"{number}.png": encoded(number), "extra.png": encoded(9)},
        )
    readers = open_pairs(tmp_path, "auto", None, RAISE)
    assert contents(readers["train"]) == [(encoded(1), "train")]
    assert contents(readers["val"]) == [(encoded(2), "validation")]


def test_the_layout_is_found_or_asked_for(tmp_path: Path, fill: Fill, write_tar: WriteTar) -> None:
    fill(tmp_path, {"i/0.png": encoded(0), "x.jsonl": json_lines({"image": "i/0.png", "txt": "j"})})
    assert detect(tmp_path) == "jsonl"
    write_tar(tmp_path / "x.tar", members(0, 1))
    with pytest.raises(DataError, match=r"ambiguous, holds webdataset and jsonl; set data\."):
        detect(tmp_path)
    assert open_pairs(tmp_path, "jsonl", None, RAISE)["train"].caption(0) == "j"
    assert open_pairs(tmp_path, "webdataset", None, RAISE)["train"].caption(0) == "caption 0"
    with pytest.raises(DataError, match="no parquet files; looked for"):
        open_pairs(tmp_path, "parquet", None, RAISE)
    with pytest.raises(DataError, match="nothing found; looked for"):
        detect(tmp_path / "i")
    with pytest.raises(FileNotFoundError, match=r"root=/nowhere: no such file"):
        TextImagePairs(Path("/nowhere"))


def test_a_hub_data_set_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError(f"Couldn't reach\n {name}")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(DataError, match=r"fetch its train\*\.parquet or \*\.tar from") as caught:
        small(Path("someone/pairs")).setup("fit")
    message = str(caught.value)
    assert "huggingface.co/datasets/someone/pairs" in message
    assert "set data.init_args.root to DIR" in message
    assert "\n" not in message


def test_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    # The columns that the datasets library makes of tar shards.
    structs = [{"bytes": encoded(n), "path": f"{n}.png"} for n in range(3)]
    table = {"__key__": ["a", "b", "c"], "jpg": structs, "txt": ["x", "y", "z"]}
    features = datasets.Features(
        {
            "__key__": datasets.Value("string"),
            "jpg": datasets.Image(),
            "txt": datasets.Value("string"),
        }
    )
    found = datasets.Dataset.from_dict(table, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda name: {"train": found, "test": found})
    readers = open_pairs(Path("someone/pairs"), "auto", None, RAISE)
    assert contents(readers["test"]) == [(encoded(n), "xyz"[n]) for n in range(3)]
    assert readers["train"].sample_id(1) == "someone/pairs[train]:row 1"


@pytest.mark.parametrize("resampling", ["bicubic", "lanczos"])
def test_the_crop_is_the_centre_square_without_aliasing(
    resampling: Literal["bicubic", "lanczos"],
) -> None:
    stripes = np.zeros((64, 160, 3), dtype=np.uint8)
    stripes[:, 48:112:2] = 255  # alternating in the centre square, black outside
    scaled = np.asarray(square_crop(Image.fromarray(stripes), 8, resampling))
    assert scaled.shape == (8, 8, 3)
    assert abs(scaled[:, 1:-1].astype(int) - 127).max() <= 8
    noise = torch.randint(256, (40, 160, 3), generator=keyed_generator(1), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    whole = image.resize((32, 8), getattr(Image.Resampling, resampling.upper()))
    assert square_crop(image, 8, resampling) == whole.crop((12, 0, 20, 8))
    sides = np.zeros((8, 24, 3), dtype=np.uint8)
    sides[:, 8:16], sides[:, 16:] = 100, 200
    for place, level in (((0.0, 0.5), 0), ((0.5, 0.5), 100), ((1.0, 0.5), 200)):
        for size in (8, 4):
            cut = square_crop(Image.fromarray(sides), size, resampling, place)
            assert abs(np.asarray(cut).astype(int) - level).max() <= (0 if size == 8 else 12)
    long = Image.new("RGB", (200_000, 1))
    assert square_crop(long, 64, resampling).size == (64, 64)


def test_transparent_images_are_seen_on_white(tmp_path: Path, fill: Fill) -> None:
    import io

    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    clear[:4, :, 3] = 255
    stream = io.BytesIO()
    Image.fromarray(clear).save(stream, "PNG")
    line = json_lines({"image": "x.png", "text": "x"})
    fill(tmp_path, {"train.jsonl": line, "test.jsonl": line, "x.png": stream.getvalue()})
    image = next(iter(small(tmp_path).test_dataloader()))["image"]
    assert (image[:, :, :4] == -1).all()
    assert (image[:, :, 4:] == 1).all()


def test_the_embedded_emoji() -> None:
    data = TextImagePairs(batch_size=8, eval_batch_size=100)
    data.setup("fit")
    assert data.num_captions == 1724
    assert len(data.category_names) == 10
    train, test = data._opened.locate("train")[0], data._opened.locate("test")[0]
    assert (len(train), len(test)) == (1724, 186)
    keys = {train.key(n) for n in range(len(train))}
    assert "1f1e8-1f1f6.png" not in keys
    assert not keys & {test.key(n) for n in range(len(test))}
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (93, 3, 64, 64)  # two equal batches
    assert batch["image"].min() >= -1
    assert batch["image"].max() == 1  # on white
    assert len(batch["category"].unique()) > 5  # not in the order of the file
    assert batch["caption"] == batch["caption_full"]
    assert data.stored_split("val") == "test"


def test_the_gallery_is_fixed() -> None:
    first = TextImagePairs(seed=0).gallery("train", 6)
    again = TextImagePairs(seed=1, batch_size=8).gallery("train", 6)
    assert first["caption"] == again["caption"] == first["caption_full"]
    assert first["key"] == again["key"]
    assert len(set(first["key"])) == 6
    other = TextImagePairs().gallery("test", 6)
    assert not set(first["key"]) & set(other["key"])
