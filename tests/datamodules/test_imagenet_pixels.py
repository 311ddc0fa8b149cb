"""ImageNetPixels: batches and splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.imagenet import ImageNetPixels
from tests.datamodules.constant_images import collect, levels, small
from tests.datamodules.fixture_types import Fill, FolderData, MakeImage, WriteParquet, WriteTar


def test_the_embedded_default_is_fashion_mnist() -> None:
    data = ImageNetPixels(num_workers=0)
    assert (data.image_size, data.channels, data.levels) == (28, 1, 256)
    assert data.num_classes == 10
    assert data.class_names[:2] == ("T-shirt/top", "Trouser")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (32, 1, 28, 28)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert (batch["image"].min(), batch["image"].max()) == (-1, 1)
    assert len(data.train_dataloader()) == 9500 // 32
    sizes = [
        len(collect(loader(), "label")) for loader in (data.val_dataloader, data.test_dataloader)
    ]
    assert sizes == [500, 2000]
    assert torch.bincount(collect(data.test_dataloader(), "label")).tolist() == [200] * 10


def test_embedded_digits() -> None:
    data = small(None, embedded="digits", channels=1, levels=17, horizontal_flip=False)
    assert data.class_names == tuple("0123456789")
    counts = [
        len(collect(loader, "label"))
        for loader in (data.train_eval_dataloader(), data.val_dataloader(), data.test_dataloader())
    ]
    assert counts == [1297, 200, 300]
    image = collect(data.train_eval_dataloader(), "image")
    assert image.unique().tolist() == pytest.approx([v / 8 - 1 for v in range(17)])


def test_digits_equal_their_source() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    source = datasets.load_digits()
    order = np.random.default_rng(0).permutation(1797)
    data = small(None, embedded="digits", channels=1, levels=17)
    loaders = (data.train_eval_dataloader(), data.val_dataloader(), data.test_dataloader())
    image = torch.cat([collect(loader, "image") for loader in loaders])
    label = torch.cat([collect(loader, "label") for loader in loaders])
    assert np.array_equal((image[:, 0].numpy() + 1) * 8, source.images[order])
    assert np.array_equal(label.numpy(), source.target[order])


def test_held_out_samples_are_never_trained_on(tmp_path: Path, folder_data: FolderData) -> None:
    root = folder_data(tmp_path)
    held_out = []
    for seed in (0, 1):
        data = small(root, seed=seed)
        train = levels(collect(data.train_dataloader(), "image")).tolist()
        kept = levels(collect(data.train_eval_dataloader(), "image")).tolist()
        val = levels(collect(data.val_dataloader(), "image")).tolist()
        assert not set(val) & set(kept)
        assert len(val) == 5
        assert sorted(val + kept) == [*range(20), *range(100, 120)]
        assert set(train) <= set(kept)
        held_out.append(val)
        assert levels(collect(data.test_dataloader(), "image")).tolist() == val
    assert held_out[0] == held_out[1]


def test_own_splits_are_used(
    tmp_path: Path, make_image: MakeImage, folder_data: FolderData, fill: Fill
) -> None:
    root = folder_data(tmp_path)
    fill(root, {f"val/{name}/x.png": make_image(200) for name in "ab"})
    data = small(root)
    assert len(collect(data.train_eval_dataloader(), "label")) == 40
    assert levels(collect(data.val_dataloader(), "image")).tolist() == [200, 200]
    assert levels(collect(data.test_dataloader(), "image")).tolist() == [200, 200]
    fill(root, {f"test/{name}/x.png": make_image(201) for name in "ab"})
    assert levels(collect(small(root).test_dataloader(), "image")).tolist() == [201, 201]


def test_index_is_the_position_in_the_split(tmp_path: Path, folder_data: FolderData) -> None:
    data = small(folder_data(tmp_path))
    ordered = collect(data.train_eval_dataloader(), "image")
    assert collect(data.train_eval_dataloader(), "index").tolist() == list(range(35))
    for batch in data.train_dataloader():
        assert torch.equal(levels(batch["image"]), levels(ordered)[batch["index"]])
        assert torch.equal(batch["label"], levels(batch["image"]) // 100)


@pytest.mark.parametrize("cache_decoded_mb", [0, 1])
def test_batches_do_not_depend_on_workers_or_cache(
    cache_decoded_mb: int, tmp_path: Path, folder_data: FolderData
) -> None:
    root = folder_data(tmp_path)
    batches = []
    for num_workers in (0, 2):
        data = small(root, num_workers=num_workers, cache_decoded_mb=cache_decoded_mb)
        loader = data.train_dataloader()
        batches.append([*loader, *loader])
    plain = small(root).train_dataloader()
    for left, right, third in zip(*batches, [*plain, *plain], strict=True):
        for key in ("image", "label", "index"):
            assert torch.equal(left[key], right[key])
            assert torch.equal(left[key], third[key])


def test_every_layout_gives_the_same_batches(
    tmp_path: Path,
    make_image: MakeImage,
    write_tar: WriteTar,
    write_parquet: WriteParquet,
    folder_data: FolderData,
) -> None:
    folder_data(tmp_path / "folder")
    images = [make_image(100 * label + n) for label in range(2) for n in range(20)]
    labels = [0] * 20 + [1] * 20
    write_parquet(tmp_path / "parquet/train.parquet", images, labels, ["a", "b"])
    members = {f"{n:03d}.png": data for n, data in enumerate(images)}
    members |= {f"{n:03d}.cls": str(label).encode() for n, label in enumerate(labels)}
    write_tar(tmp_path / "tar/train-0.tar", members)
    pixels = np.repeat(np.r_[0:20, 100:120].astype(np.uint8), 192).reshape(40, 192)
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz/train_data_batch_1.npz", data=pixels, labels=np.array(labels) + 1)
    found = [
        [*small(tmp_path / name).train_dataloader(), *small(tmp_path / name).val_dataloader()]
        for name in ("folder", "parquet", "tar", "npz")
    ]
    for batches in zip(*found, strict=True):
        for batch in batches[1:]:
            assert torch.equal(batch["image"], batches[0]["image"])
            assert torch.equal(batch["label"], batches[0]["label"])


def test_flips_are_keyed_by_seed_epoch_and_index(
    tmp_path: Path, write_parquet: WriteParquet
) -> None:
    ramp = np.arange(8, dtype=np.uint8)[None, None, :, None].repeat(200, 0).repeat(8, 1)
    np.savez(tmp_path / "train.npz", images=ramp, labels=np.arange(200) % 2)

    def flipped(epochs: int, **arguments: object) -> list[dict[int, bool]]:
        data = small(tmp_path / "train.npz", channels=1, batch_size=5, **arguments)
        loader = data.train_dataloader()
        found = []
        for _ in range(epochs):
            batches = list(loader)
            mirrored = (collect(batches, "image")[:, 0, 0, 0] > -1).tolist()
            indices = collect(batches, "index").tolist()
            found.append(dict(zip(indices, mirrored, strict=True)))
        return found

    first, second = flipped(2, seed=1)
    assert 60 < sum(first.values()) < 140
    assert 60 < sum(first[index] != second[index] for index in first) < 140
    assert flipped(1, seed=1) == [first]
    assert flipped(1, seed=2) != [first]
    assert not any(flipped(1, horizontal_flip=False)[0].values())
    kept = small(tmp_path / "train.npz", channels=1, unflipped_classes=(1,))
    for batch in kept.train_dataloader():
        assert (batch["image"][batch["label"] == 1][:, 0, 0, 0] == -1).all()
    for loader in (kept.train_eval_dataloader(), kept.val_dataloader(), kept.test_dataloader()):
        assert (collect(loader, "image")[:, 0, 0, 0] == -1).all()


def test_requests_are_balanced_over_classes(tmp_path: Path, folder_data: FolderData) -> None:
    root = folder_data(tmp_path)
    batches = list(small(root).predict_dataloader())
    assert torch.bincount(torch.cat([batch["label"] for batch in batches])).tolist() == [10, 10]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(20))
    assert all(set(batch) == {"label", "index"} for batch in batches)
    chosen = list(small(root, predict_classes=(1,), predict_count=3).predict_dataloader())
    assert [batch["label"].tolist() for batch in chosen] == [[1, 1, 1]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_data_out(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_data: FolderData
) -> None:
    root = folder_data(tmp_path)
    seen: dict[str, list[int]] = {"train": [], "val": [], "predict": []}
    for rank in range(world_size):
        place = (rank, world_size)
        monkeypatch.setattr("datamodules.module_loaders.rank_and_world_size", lambda _, p=place: p)
        data = small(root)
        for name, loader in (
            ("train", data.train_dataloader()),
            ("val", data.val_dataloader()),
            ("predict", data.predict_dataloader()),
        ):
            seen[name] += collect(loader, "index").tolist()
    assert len(set(seen["train"])) == len(seen["train"]) == 35 // (4 * world_size) * 4 * world_size
    assert seen["val"] == list(range(5))
    assert seen["predict"] == list(range(20))


def test_fingerprint_follows_data_and_format(
    tmp_path: Path, make_image: MakeImage, folder_data: FolderData, fill: Fill
) -> None:
    root = folder_data(tmp_path)
    same = {small(root).data_fingerprint, small(root, seed=5, batch_size=2).data_fingerprint}
    assert len(same) == 1
    other = {
        small(root, **arguments).data_fingerprint
        for arguments in ({"image_size": 4}, {"channels": 1}, {"val_size": 6}, {"crop": "resize"})
    }
    fill(root, {"train/a/new.png": make_image()})
    other.add(small(root).data_fingerprint)
    assert len(other | same) == 6
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in other)
