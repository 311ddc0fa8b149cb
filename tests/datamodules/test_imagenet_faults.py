"""ImageNetPixels: unusable samples, and arguments that make no sense."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from datamodules.errors import DataError, SampleError
from datamodules.imagenet import ImageNetPixels
from datamodules.readers.detection import Format
from tests.datamodules.constant_images import collect, levels, small
from tests.datamodules.fixture_types import Fill, FolderData, MakeImage, WriteParquet, WriteTar


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cache_decoded_mb", [0, 1])
def test_a_bad_image_stops_with_its_name(
    cache_decoded_mb: int, num_workers: int, tmp_path: Path, folder_data: FolderData, fill: Fill
) -> None:
    root = folder_data(tmp_path)
    fill(root, {"train/b/007.png": b"broken"})
    data = small(root, num_workers=num_workers, cache_decoded_mb=cache_decoded_mb)
    with pytest.raises(SampleError) as caught:
        list(data.train_eval_dataloader())
    message = str(caught.value)
    assert message.startswith(f"{root}/train/b/007.png: cannot decode the image: not a JPEG")
    assert "\n" not in message


@pytest.mark.parametrize("cache_decoded_mb", [0, 1])
def test_a_bad_image_may_be_skipped(
    cache_decoded_mb: int,
    tmp_path: Path,
    make_image: MakeImage,
    folder_data: FolderData,
    fill: Fill,
) -> None:
    root = folder_data(tmp_path)
    fill(root, {"val/a/x.png": make_image(), "val/b/x.png": make_image()})
    fill(root, {"train/b/007.png": b"broken"})
    data = small(root, on_error="skip", max_skipped_share=0.03, cache_decoded_mb=cache_decoded_mb)
    loader = data.train_eval_dataloader()
    with pytest.warns(UserWarning, match=r"skipped .*007\.png: cannot decode") as caught:
        first = list(loader)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = list(loader)
    for batches in (first, second):
        found = levels(collect(batches, "image")).tolist()
        assert found == [n if n != 107 else 108 for n in [*range(20), *range(100, 120)]]
        assert collect(batches, "index").tolist()[27:29] == [28, 28]
    assert loader.dataset.num_skipped == 1  # type: ignore[attr-defined]


def test_too_many_bad_images_stop_also_under_skip(
    tmp_path: Path, folder_data: FolderData, fill: Fill
) -> None:
    root = folder_data(tmp_path)
    fill(root, {f"train/b/{n:03d}.png": b"broken" for n in (3, 7)})
    data = small(root, on_error="skip", val_size=1, max_skipped_share=0.03)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(DataError, match=r"2 of 39 samples unusable, more than max.*=0\.03"),
    ):
        list(data.train_eval_dataloader())


@pytest.mark.filterwarnings("ignore:skipped")
def test_skips_are_counted_over_workers(
    tmp_path: Path, folder_data: FolderData, fill: Fill
) -> None:
    root = folder_data(tmp_path)
    fill(root, {f"train/b/{n:03d}.png": b"broken" for n in (0, 4, 8, 12, 16)})
    data = small(root, on_error="skip", val_size=1, max_skipped_share=0.5, num_workers=2)
    loader = data.train_eval_dataloader()
    list(loader)
    assert loader.dataset.num_skipped == 5  # type: ignore[attr-defined]


def test_a_wrong_label_is_a_bad_sample(
    tmp_path: Path, make_image: MakeImage, write_tar: WriteTar
) -> None:
    members = {f"{n:03d}.png": make_image(n) for n in range(20)}
    members |= {f"{n:03d}.cls": b"0" if n != 11 else b"cat" for n in range(20)}
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(SampleError, match=r"train-0\.tar:011: no integer label"):
        list(small(tmp_path, val_size=1).train_dataloader())
    data = small(tmp_path, val_size=1, on_error="skip", max_skipped_share=0.1)
    with pytest.warns(UserWarning, match="skipped"):
        assert len(collect(data.train_eval_dataloader(), "label")) == 19


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"^batch_size=0: must be >= 1 \(data\.init_args\.batch_size\)$"),
        ({"eval_batch_size": 0}, "eval_batch_size=0: must be >= 1"),
        ({"image_size": 0}, "image_size=0: must be >= 1"),
        ({"num_workers": -1}, "num_workers=-1: must be >= 0"),
        ({"val_size": 0}, "val_size=0: must be >= 1"),
        ({"channels": 2}, "channels=2: must be 1 "),
        ({"levels": 1}, r"levels=1: must be 2 \.\. 256"),
        ({"levels": 257}, r"levels=257: must be 2 \.\. 256"),
        ({"cache_decoded_mb": -1}, "cache_decoded_mb=-1: must be >= 0"),
        ({"max_skipped_share": 1.5}, r"max_skipped_share=1\.5: must be 0 \.\. 1"),
        ({"predict_count": 0}, "predict_count=0: must be >= 1"),
        ({"predict_classes": ()}, r"predict_classes=\(\): must name a class"),
        ({"seed": -1}, "seed=-1: must be >= 0"),
        ({"embedded": "digits"}, "embedded digits are 8 x 8 with 17 levels"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageNetPixels(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unflipped_classes": (2,)}, r"unflipped_classes=\(2,\): classes are 0 \.\. 1"),
        ({"predict_classes": (-1,)}, r"predict_classes=\(-1,\): classes are 0 \.\. 1"),
        ({"val_size": 40}, "val_size=40: must be less than the 40 training samples"),
    ],
)
def test_arguments_that_do_not_fit_the_data(
    arguments: dict[str, Any], message: str, tmp_path: Path, folder_data: FolderData
) -> None:
    data = small(folder_data(tmp_path), **arguments)
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_a_batch_larger_than_the_data_is_an_error(tmp_path: Path, folder_data: FolderData) -> None:
    data = small(folder_data(tmp_path), batch_size=36)
    with pytest.raises(ValueError, match=r"35 training samples: fewer than one global batch of 36"):
        data.train_dataloader()


@pytest.mark.parametrize("layout", ["auto", "folder", "npz"])
def test_a_missing_root_is_explained(layout: Format, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.init_args\.root=.*gone: no such file or"):
        ImageNetPixels(tmp_path / "gone", format=layout)


@pytest.mark.parametrize(
    "root",
    [
        "data/imagenet",
        "datasets/imagenet",
        "here/imagenet",
        "./imagenet",
        "../imagenet",
        "~/imagenet",
        "a/b/imagenet",
        "imagenet",
        "someone/train.parquet",
    ],
)
def test_a_missing_path_is_no_name_of_the_hub(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking the hub for a folder that is not there would take half a minute."""
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; .*OWNER/NAME") as caught:
        ImageNetPixels(Path(root))
    assert f"data.init_args.root={Path(root)}: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["someone/pictures", "zh-plus/tiny-imagenet", "a_1/b.c"])
def test_a_name_of_the_hub_is_taken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ImageNetPixels(Path(name)).root == Path(name)
    Path(name).mkdir(parents=True)
    assert ImageNetPixels(Path(name)).root == Path(name), "and so is a folder of that name"


def test_class_sets_must_agree(
    tmp_path: Path, make_image: MakeImage, folder_data: FolderData, fill: Fill
) -> None:
    root = folder_data(tmp_path)
    fill(root, {"val/a/x.png": make_image(), "val/c/x.png": make_image()})
    with pytest.raises(DataError, match=r"2 classes in val, 2 in train.*differing: b, c"):
        _ = small(root).num_classes


def test_a_root_without_training_data(tmp_path: Path, write_parquet: WriteParquet) -> None:
    write_parquet(tmp_path / "test.parquet", [], [])
    with pytest.raises(DataError, match=r"no training split \(found: test\)"):
        _ = small(tmp_path).num_classes
    (tmp_path / "test.parquet").unlink()
    write_parquet(tmp_path / "train.parquet", [], [])
    with pytest.raises(DataError, match="split train is empty"):
        _ = small(tmp_path).num_classes
