"""DocumentsAndPhotographs on images from disk: layouts, splits, unusable images, arguments."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.documents import DocumentBatch, DocumentsAndPhotographs
from datamodules.errors import DataError, SampleError
from tests.datamodules import constant_images
from tests.datamodules.constant_images import SMALL, collect
from tests.datamodules.fixture_types import Fill, FolderData, MakeImage, WriteParquet, WriteTar


def small(root: Path | None, **arguments: object) -> DocumentsAndPhotographs:
    return DocumentsAndPhotographs(root, **{**SMALL, "patch_size": 4, **arguments})


def levels(batches: Iterable[DocumentBatch]) -> list[int]:
    """The grey levels of constant images."""
    return constant_images.levels(collect(batches, "image")).tolist()


@pytest.fixture
def flat(tmp_path: Path, make_image: MakeImage, fill: Fill) -> Path:
    """20 constant images, directly in a folder, in two formats."""
    kinds = {"jpg": "JPEG", "PNG": "PNG"}
    endings = ["jpg", "PNG"] * 10
    files = {
        f"{n:012d}.{ending}": make_image(n, kind=kinds[ending]) for n, ending in enumerate(endings)
    }
    return fill(tmp_path / "train2017", files | {"notes.txt": b"", ".hidden.png": b"broken"})


def test_a_flat_folder_holds_out_the_same_images_for_every_seed(flat: Path) -> None:
    held_out = []
    for seed in (0, 1):
        data = small(flat, seed=seed)
        kept, val = levels(data.train_eval_dataloader()), levels(data.val_dataloader())
        assert sorted(kept + val) == list(range(20))
        assert len(val) == 5
        assert set(levels(data.train_dataloader())) <= set(kept)
        assert levels(data.test_dataloader()) == val
        held_out.append(val)
    assert held_out[0] == held_out[1]
    assert data.source_name == "train2017"


def test_what_is_not_known_is_minus_one(flat: Path) -> None:
    data = small(flat)
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (5, 3, 8, 8)
    assert batch["image"].dtype == batch["complexity"].dtype == torch.float32
    shapes = {"kind": (5,), "region": (5, 4), "item_token": (5, 4), "scene": (5,)}
    for field, shape in shapes.items():
        assert batch[field].shape == shape  # type: ignore[literal-required]
        assert batch[field].dtype == torch.int64  # type: ignore[literal-required]
        assert (batch[field] == -1).all()  # type: ignore[literal-required]
    assert data.kind_names == data.region_names == data.scene_names == ()
    assert data.grid == (2, 2)


def test_complexity_is_the_size_of_the_png(tmp_path: Path, fill: Fill) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    noise[:3] = 128
    files, sizes = {}, []
    for number, pixels in enumerate(noise):
        streams = io.BytesIO(), io.BytesIO()
        Image.fromarray(pixels).save(streams[0], "PNG")
        Image.fromarray(pixels).save(streams[1], "PNG", compress_level=1)
        files[f"val/{number}.png"] = streams[0].getvalue()
        sizes.append(len(streams[1].getvalue()))
    files |= {f"train/{number}.png": files["val/0.png"] for number in range(4)}
    data = small(fill(tmp_path, files))
    loader = data.val_dataloader()
    for _ in range(2):
        assert collect(loader, "complexity").tolist() == sizes
    assert not collect(data.train_dataloader(), "complexity").any()
    assert sizes[0] < sizes[-1]


def test_images_are_resized_and_cropped_at_the_centre(tmp_path: Path, fill: Fill) -> None:
    pixels = np.zeros((12, 48, 3), dtype=np.uint8)
    pixels[:, 18:30] = (255, 128, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    root = fill(tmp_path, {f"{n}.png": stream.getvalue() for n in range(8)})
    for crop in ("resize", "adm"):
        data = small(root, image_size=6, patch_size=2, val_size=2, crop=crop)
        image = next(iter(data.val_dataloader()))["image"]
        assert image.shape == (2, 3, 6, 6)
        middle = image[0, :, 3, 2:4].mean(dim=1)
        assert torch.allclose(middle, torch.tensor([1.0, 0.004, -1.0]), atol=0.01)


def test_folders_named_after_splits(tmp_path: Path, make_image: MakeImage, fill: Fill) -> None:
    files = {f"train2017/{n}.jpg": make_image(n, kind="JPEG") for n in range(6)}
    files |= {f"val2017/{n}.jpg": make_image(100 + n, kind="JPEG") for n in range(3)}
    root = fill(tmp_path, files | {"annotations/captions.json": b"{}"})
    data = small(root)
    assert levels(data.train_eval_dataloader()) == list(range(6))
    assert levels(data.val_dataloader()) == levels(data.test_dataloader()) == [100, 101, 102]
    fill(root, {"test2017/0.png": make_image(200)})
    assert levels(small(root).test_dataloader()) == [200]
    fill(root, {"unlabeled2017/0.png": make_image(50)})
    with pytest.raises(DataError, match=r"unlabeled2017: holds images, as does .*; set data\.init"):
        small(root).setup("fit")
    assert levels(small(root, format="flat").train_eval_dataloader()) == list(range(6))
    (root / "annotations/captions.json").unlink()
    (root / "annotations").rmdir()
    assert small(root, format="folder").kind_names[-1] == "val2017"
    fill(root, {"train2014/0.png": make_image(50)})
    with pytest.raises(DataError, match="train2017: second folder for split train; keep only one"):
        small(root, format="flat").setup("fit")


def test_class_folders_and_parquet_keep_their_classes(
    tmp_path: Path, make_image: MakeImage, folder_data: FolderData, write_parquet: WriteParquet
) -> None:
    data = small(folder_data(tmp_path / "folders"))
    assert data.kind_names == ("a", "b")
    kinds, found = (
        collect(data.train_eval_dataloader(), "kind").tolist(),
        levels(data.train_eval_dataloader()),
    )
    assert kinds == [level // 100 for level in found]
    images = [make_image(n) for n in range(10)]
    file = tmp_path / "rows" / "train.parquet"
    write_parquet(file, images, [n % 3 for n in range(10)], ["x", "y", "z"])
    data = small(file.parent)
    assert data.kind_names == ("x", "y", "z")
    assert [n % 3 for n in levels(data.val_dataloader())] == collect(
        data.val_dataloader(), "kind"
    ).tolist()
    write_parquet(file, images, [-1] * 10)
    data = small(file.parent)
    assert data.kind_names == ()
    assert collect(data.train_eval_dataloader(), "kind").tolist() == [-1] * 5


def test_shards_without_labels(tmp_path: Path, make_image: MakeImage, write_tar: WriteTar) -> None:
    members = {f"{n:03d}.png": make_image(n) for n in range(12)}
    members |= {f"{n:03d}.json": b'{"caption": "a cat"}' for n in range(6)}
    write_tar(tmp_path / "train-0.tar", members)
    data = small(tmp_path, num_workers=1)
    assert sorted(levels(data.train_eval_dataloader()) + levels(data.val_dataloader())) == list(
        range(12)
    )
    assert set(collect(data.val_dataloader(), "kind").tolist()) == {-1}
    assert len(data.data_fingerprint) == 16


def test_workers_resumes_and_caches_change_nothing(flat: Path) -> None:
    plain = small(flat).train_dataloader()
    expected = [batch["image"] for batch in [*plain, *plain]]
    for arguments in ({"num_workers": 2}, {"cache_decoded_mb": 0}):
        stopped = small(flat, **arguments).train_dataloader()
        found = [batch["image"] for batch in stopped]
        found.append(next(iter(stopped))["image"])
        resumed = small(flat, **arguments).train_dataloader()
        resumed.load_state_dict(stopped.state_dict())
        found += [batch["image"] for batch in resumed]
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_stops_with_its_name(num_workers: int, flat: Path, fill: Fill) -> None:
    fill(flat, {"000000000007.PNG": b"broken"})
    data = small(flat, num_workers=num_workers)
    with pytest.raises(SampleError) as caught:
        list(data.train_eval_dataloader()) + list(data.val_dataloader())
    message = str(caught.value)
    assert message.startswith(f"{flat}/000000000007.PNG: cannot decode the image: not a JPEG")
    assert "\n" not in message


def test_a_broken_image_may_be_skipped(flat: Path, make_image: MakeImage, fill: Fill) -> None:
    fill(flat, {"000000000007.PNG": b"broken"})
    fill(flat.parent, {"val/0.png": make_image(100)})
    data = small(flat.parent, on_error="skip", max_skipped_share=0.05)
    loader = data.train_eval_dataloader()
    with pytest.warns(UserWarning, match=r"skipped .*007\.PNG: cannot decode"):
        batches = list(loader)
    assert levels(batches) == [n if n != 7 else 8 for n in range(20)]
    assert collect(batches, "index").tolist()[6:9] == [6, 8, 8]
    assert loader.dataset.num_skipped == 1  # type: ignore[attr-defined]
    fill(flat, {"000000000009.PNG": b"broken"})
    data = small(flat.parent, on_error="skip", max_skipped_share=0.05)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(DataError, match=r"2 of 20 samples unusable, more than max.*=0\.05"),
    ):
        list(data.train_eval_dataloader())


def test_a_broken_row_of_parquet(
    tmp_path: Path, make_image: MakeImage, write_parquet: WriteParquet
) -> None:
    images = [make_image(n) if n != 3 else b"broken" for n in range(10)]
    write_parquet(tmp_path / "train.parquet", images, [0] * 10, ["x"])
    write_parquet(tmp_path / "val.parquet", images[:2], [0] * 2, ["x"])
    with pytest.raises(SampleError, match=r"train\.parquet:row 3: cannot decode"):
        list(small(tmp_path).train_eval_dataloader())
    data = small(tmp_path, on_error="skip", max_skipped_share=0.1)
    with pytest.warns(UserWarning, match="row 3"):
        assert levels(data.train_eval_dataloader()) == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be >= 1 (data.init_args.batch_size)"),
        ({"train_size": 0}, "train_size=0: must be >= 1 (data.init_args.train_size)"),
        ({"predict_count": 0}, "predict_count=0: must be >= 1 (data.init_args.predict_count)"),
        ({"seed": -1}, "seed=-1: must be >= 0 (data.init_args.seed)"),
        (
            {"max_skipped_share": 1.5},
            "max_skipped_share=1.5: must be 0 .. 1 (data.init_args.max_skipped_share)",
        ),
        (
            {"image_size": 64},
            "image_size=64: must be 96 for the embedded images, or give a root "
            "(data.init_args.image_size)",
        ),
        (
            {"image_size": 96, "patch_size": 32},
            "patch_size=32: must divide 48, half an embedded image (data.init_args.patch_size)",
        ),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"init_args") as caught:
        DocumentsAndPhotographs(**arguments)
    assert str(caught.value) == message


def test_arguments_that_do_not_fit_the_data(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^patch_size=3: must divide image_size=8 \(data.init_"):
        small(flat, patch_size=3)
    with pytest.raises(ValueError, match=r"^val_size=20: must be less than the 20 training images"):
        small(flat, val_size=20).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"^data\.init_args\.root=.*none: no such file"):
        small(tmp_path / "none", format="flat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no flat folder of images; expected \*\.jpg in it"):
        small(tmp_path / "empty", format="flat").setup("fit")
    with pytest.raises(DataError, match=r"empty: nothing found"):
        small(tmp_path / "empty").setup("fit")
