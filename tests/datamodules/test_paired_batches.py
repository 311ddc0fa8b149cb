"""Batches of paired scenes: keyed, resumable, shared over ranks, with images or stored tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.errors import DataError
from datamodules.paired_2d3d.batch import PairedBatch
from datamodules.paired_2d3d.image_features import ImageFeatures, write_description
from datamodules.paired_2d3d.images import ImageAugmentation
from datamodules.paired_2d3d.paired_scenes import PairedScenes
from datamodules.paired_2d3d.view_options import ViewOptions
from datamodules.paired_2d3d.voxel_sampling import sample_voxels
from tests.datamodules.paired_roots import paired_root, room_cameras, write_scene, write_split

SMALL: dict[str, Any] = {
    "grid_size": 0.1,
    "max_points": 200,
    "patch_grid": (4, 4),
    "patch_pixels": 6,
    "views": ViewOptions(local_views=2),
    "batch_size": 2,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paired_root(tmp_path_factory.mktemp("paired"), train=5, val=3)


def scenes(root: Path, **changed: Any) -> PairedScenes:  # noqa: ANN401
    return PairedScenes(root, **{**SMALL, **changed})


def same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_fields_of_a_batch(root: Path) -> None:
    data = scenes(root)
    data.setup("fit")
    batch: PairedBatch = next(iter(data.train_dataloader()))
    points, local_points = len(batch["global_coord"]), len(batch["local_coord"])
    for kind, count in (("global", points), ("local", local_points)):
        for field in ("coord", "origin_coord", "colour", "normal"):
            values: Tensor = batch[f"{kind}_{field}"]  # type: ignore[literal-required]
            assert values.shape == (count, 3)
            assert values.dtype == torch.float32
            assert values.isfinite().all()
    for offset, views, end in (
        (batch["global_offset"], 4, points),
        (batch["local_offset"], 4, local_points),
    ):
        assert offset.dtype == torch.int64
        assert len(offset) == views
        assert (offset.diff() > 0).all()
        assert offset[-1] == end
    assert batch["correspondence"].shape == (points, 2, 2)
    assert batch["image_number"].tolist() == [2, 2]
    assert batch["image"].shape == (4, 3, 24, 24)
    assert batch["image"].min() >= 0
    assert batch["image"].max() <= 1
    paths = [data.image_paths()[number] for number in batch["image_index"].tolist()]
    names = [f"train{index}" for index in batch["index"].tolist()]
    assert [path.split("/")[2] for path in paths] == [names[0]] * 2 + [names[1]] * 2
    assert "image_tokens" not in batch


def test_normals_have_length_one_or_are_dropped(root: Path) -> None:
    views = replace(SMALL["views"], drop_normal=0.0, drop_some=1.0)
    for batch in scenes(root, views=views).train_dataloader():
        lengths = batch["global_normal"].norm(dim=1)
        dropped = lengths == 0
        torch.testing.assert_close(lengths[~dropped], torch.ones(int((~dropped).sum())))
        assert 0.1 < dropped.float().mean() < 0.3


def test_the_same_key_gives_the_same_batch_and_another_another(root: Path) -> None:
    first, second = (scenes(root).train_dataloader() for _ in range(2))
    epochs = [[list(loader) for _ in range(2)] for loader in (first, second)]
    for one, other in zip(epochs[0], epochs[1], strict=True):
        assert all(map(same, one, other))
    by_epoch = [
        {int(i): b["global_offset"].tolist() for b in epoch for i in b["index"][:1]}
        for epoch in epochs[0]
    ]
    assert by_epoch[0] != by_epoch[1]
    data = scenes(root)
    dataset = data.train_dataloader().dataset
    assert not torch.equal(dataset[(0, 0)]["global_coord"], dataset[(0, 1)]["global_coord"])
    other_seed = scenes(root, seed=1).train_dataloader().dataset
    assert not torch.equal(dataset[(0, 0)]["global_coord"], other_seed[(0, 0)]["global_coord"])


def test_global_random_numbers_are_neither_used_nor_needed(root: Path) -> None:
    dataset = scenes(root).train_dataloader().dataset
    before = torch.random.get_rng_state()
    numbers = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]  # noqa: NPY002
    first = dataset[(1, 3)]
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numbers)  # type: ignore[index]  # noqa: NPY002
    torch.manual_seed(99)
    assert same(first, dataset[(1, 3)])


def test_workers_do_not_change_batches(root: Path) -> None:
    alone = list(scenes(root).train_dataloader())
    shared = list(scenes(root, num_workers=2).train_dataloader())
    assert all(map(same, alone, shared))


def test_a_position_in_an_epoch_is_resumed(root: Path) -> None:
    whole = scenes(root, batch_size=1).train_dataloader()
    batches = [*whole, *whole]
    part = scenes(root, batch_size=1).train_dataloader()
    reader = iter(part)
    for _ in range(3):
        next(reader)
    resumed = scenes(root, batch_size=1).train_dataloader()
    resumed.load_state_dict(part.state_dict())
    rest = [*resumed, *resumed]
    assert len(rest) == 7
    assert all(map(same, batches[3:], rest))


def test_ranks_share_an_epoch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = scenes(root, batch_size=2).train_dataloader()
    module = "datamodules.module_loaders.rank_and_world_size"
    parts = []
    for rank in range(2):
        monkeypatch.setattr(module, lambda _trainer, rank=rank: (rank, 2))
        parts.append(list(scenes(root, batch_size=1).train_dataloader()))
    for whole, first, second in zip(together, *parts, strict=True):
        assert whole["index"].tolist() == [*first["index"].tolist(), *second["index"].tolist()]
        joined = torch.cat((first["global_coord"], second["global_coord"]))
        assert torch.equal(whole["global_coord"], joined)


def test_correspondences_point_at_the_projected_points(root: Path) -> None:
    batch = scenes(root).train_dataloader().dataset[(0, 0)]
    coord = batch["global_origin_coord"].numpy()
    seen_of_all = 0
    for place, camera in enumerate(room_cameras(((48, 64), (60, 80)))):
        column, row, _ = camera.project(coord).T
        side = camera.height / 4
        expected = np.stack((row, column - (camera.width - camera.height) / 2), axis=1) / side
        found = batch["correspondence"][:, place].numpy()
        seen = found[:, 0] >= 0
        seen_of_all += int(seen.sum())
        np.testing.assert_allclose(found[seen], expected[seen], atol=1 / side + 1e-5)
        inside = ((expected > 0.1) & (expected < 3.9)).all(axis=1)
        assert seen[inside].all()
    assert seen_of_all > 100


def test_items_without_images(tmp_path: Path) -> None:
    entries = {
        "none": write_scene(tmp_path, "train", "none", sizes=()),
        "two": write_scene(tmp_path, "train", "two"),
        "blind": write_scene(tmp_path, "train", "blind", sizes=((48, 64),)),
    }
    np.save(tmp_path / "images/train/blind/correspondence/0.npy", np.array([[-1.0, -1.0, -1.0]]))
    write_split(tmp_path, "train", entries)
    data = scenes(tmp_path)
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    batch = dataset[(0, 0)]
    assert batch["image"].shape == (0, 3, 24, 24)
    assert batch["correspondence"].shape[1:] == (1, 2)
    assert (batch["correspondence"] == -1).all()
    batch = dataset.__getitems__([(0, 0), (1, 0), (2, 0)])
    assert batch["image_number"].tolist() == [0, 2, 0]
    assert batch["correspondence"].shape[1] == 2
    first = batch["global_offset"][1]
    assert (batch["correspondence"][:first] == -1).all()


def test_no_images_are_read_for_three_dimensions_alone(root: Path) -> None:
    data = scenes(root, images_per_item=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image_number"].tolist() == [0, 0]
    assert data.image_paths() == ()


def test_of_many_images_a_draw_is_used(root: Path) -> None:
    dataset = scenes(root, images_per_item=1).train_dataloader().dataset
    drawn = {int(dataset[(0, epoch)]["image_index"]) for epoch in range(12)}
    assert len(drawn) == 2


def test_validation_is_the_same_every_time(root: Path) -> None:
    data = scenes(root, image_augmentation=ImageAugmentation(offset_chance=1.0))
    data.setup("validate")
    loader = data.val_dataloader()
    first, second = list(loader), list(loader)
    assert [batch["index"].tolist() for batch in first] == [[0, 1], [2]]
    assert all(map(same, first, second))
    assert all(map(same, first, scenes(root, seed=5).val_dataloader()))
    assert scenes(root, val_splits=()).val_dataloader() == []


def _write_features(folder: Path, paths: tuple[str, ...], **changed: Any) -> Path:  # noqa: ANN401
    """Tokens whose value is the number of their image."""
    folder.mkdir()
    order = tuple(reversed(paths))  # an order of its own
    tokens = np.empty((len(order), 16, 5), dtype=np.float16)
    tokens[:] = np.array([paths.index(path) for path in order])[:, None, None]
    np.save(folder / "features.npy", tokens)
    stated = {"encoder": "toy", "grid": (4, 4), "channels": 5, "images": order}
    write_description(folder, **{**stated, **changed})
    return folder


def test_stored_tokens_replace_images(root: Path, tmp_path: Path) -> None:
    plain = scenes(root)
    folder = _write_features(tmp_path / "features", plain.image_paths())
    for image in root.glob("images/**/1.png"):
        assert image.exists()
    data = scenes(root, image_features=folder)
    data.setup("fit")
    batches = list(data.train_dataloader())
    for batch, pictures in zip(batches, plain.train_dataloader(), strict=True):
        assert "image" not in batch
        assert batch["image_tokens"].dtype == torch.float16
        assert batch["image_tokens"].shape == (4, 16, 5)
        assert batch["image_tokens"][:, 0, 0].tolist() == batch["image_index"].tolist()
        for name in ("global_coord", "correspondence", "image_index"):
            assert torch.equal(batch[name], pictures[name])
    plain.use_image_features(folder)
    assert all(map(same, batches, plain.train_dataloader()))
    with_workers = scenes(root, image_features=folder, num_workers=1)
    assert all(map(same, batches, with_workers.train_dataloader()))
    plain.use_image_features(None)
    assert "image" in next(iter(plain.train_dataloader()))


def test_stored_tokens_of_something_else_are_refused(root: Path, tmp_path: Path) -> None:
    data = scenes(root)
    paths = data.image_paths()
    for number, (changed, message) in enumerate(
        [
            ({"grid": (2, 8)}, "patch_grid is"),
            ({"channels": 6}, "float16"),
            ({"images": [f"x{path}" for path in paths]}, "16 of 16 images are missing"),
            ({"images": "abc"}, "float16"),
            ({"grid": ("4", 4)}, "expected encoder, grid"),
        ]
    ):
        folder = _write_features(tmp_path / str(number), paths, **changed)
        with pytest.raises(DataError, match=message) as caught:
            data.use_image_features(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        ImageFeatures(tmp_path)
    with pytest.raises(ValueError, match=r"^image_augmentation=.*unchanged images"):
        scenes(root, image_features=tmp_path, image_augmentation=ImageAugmentation(blur_chance=1.0))


def test_all_images_can_be_encoded_once(root: Path) -> None:
    data = scenes(root)
    paths = data.image_paths()
    batches = list(data.image_batches(paths, 5))
    assert [len(batch["image"]) for batch in batches] == [4, 4, 4, 4]
    assert torch.cat([batch["image_index"] for batch in batches]).tolist() == list(range(16))
    images = torch.cat([batch["image"] for batch in batches])
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["image"], images[batch["image_index"]])


def test_whole_clouds_of_the_validation(root: Path) -> None:
    data = scenes(root)
    assert data.cloud_count() == 3
    cloud = data.whole_cloud(1)
    coord = np.load(root / "val/val1/coord.npy")
    np.testing.assert_array_equal(cloud.coord, coord[sample_voxels(coord, 0.1, None)])
    assert cloud.colour.shape == cloud.normal.shape == cloud.coord.shape
    assert len(data.train_image_paths()) == 10
    assert set(data.train_image_paths()) < set(data.image_paths())
    assert data.root_folder == root


def test_fingerprint_changes_with_what_is_sampled(root: Path, tmp_path: Path) -> None:
    data = scenes(root)
    assert data.fingerprint == scenes(root, num_workers=1, seed=4).fingerprint
    assert len(data.fingerprint) == 16
    others = [
        scenes(root, grid_size=0.2),
        scenes(root, patch_grid=(2, 2)),
        scenes(root, train_splits=("val",)),
        scenes(paired_root(tmp_path, train=5, val=3, points=601)),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_setup_tells_of_missing_files(tmp_path: Path) -> None:
    paired_root(tmp_path, train=2, val=0)
    (tmp_path / "images/train/train1/color/1.png").unlink()
    with pytest.raises(DataError, match=r"1 problems .*train1/color/1\.png: no such file"):
        scenes(tmp_path).setup("fit")


def test_damage_met_in_a_worker_is_one_line(tmp_path: Path) -> None:
    paired_root(tmp_path, train=2, val=0)
    np.save(tmp_path / "images/train/train1/correspondence/1.npy", np.array([[0.0, 0.0, 9999.0]]))
    data = scenes(tmp_path, num_workers=1)
    with pytest.raises(DataError, match=r"names point 9999 of a cloud of 600") as caught:
        list(data.train_dataloader())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grid_size", 0.0),
        ("max_points", 0),
        ("patch_grid", (0, 4)),
        ("batch_size", 0),
        ("images_per_item", -1),
        ("train_splits", ()),
        ("procedural_rooms", (1, 1, 1, -1)),
    ],
)
def test_arguments_out_of_range_are_named(root: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.*data\.init_args\.{name}"):
        scenes(root, **{name: value})


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^data\.init_args\.root="):
        scenes(tmp_path / "nothing")
    with pytest.raises(ValueError, match="expected a name such as train"):
        scenes(tmp_path, train_splits=("../x",))
