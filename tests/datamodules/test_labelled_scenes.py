"""Labelled clouds: what a batch holds, what training draws, and the way back to the files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from datamodules.errors import DataError
from datamodules.paired_2d3d.labelled_augmentation import (
    VOTES,
    LabelledAugmentation,
    augment,
    crop_sphere,
)
from datamodules.paired_2d3d.labelled_batch import LabelledBatch
from datamodules.paired_2d3d.labelled_scenes import LabelledScenes
from datamodules.paired_2d3d.labelled_tree import LabelledCloud
from tests.lightning_modules.segmentation_runs import CLASSES, tiny_scenes, write_tree


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"))


def batches(data: LabelledScenes) -> list[LabelledBatch]:
    return list(data.train_dataloader())


def assert_equal_batches(one: list[LabelledBatch], other: list[LabelledBatch]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert first["name"] == second["name"]
        for key in ("coord", "colour", "normal", "offset", "grid_coord", "segment", "index"):
            assert torch.equal(first[key], second[key]), key  # type: ignore[literal-required]


def test_training_batch_keeps_its_contract(root: Path) -> None:
    batch = batches(tiny_scenes(root))[0]
    count = int(batch["offset"][-1])
    for name, kind, shape in (
        ("coord", torch.float32, (count, 3)),
        ("colour", torch.float32, (count, 3)),
        ("normal", torch.float32, (count, 3)),
        ("grid_coord", torch.int64, (count, 3)),
        ("segment", torch.int64, (count,)),
        ("offset", torch.int64, (2,)),
        ("index", torch.int64, (2,)),
    ):
        value = batch[name]  # type: ignore[literal-required]
        assert (value.dtype, tuple(value.shape)) == (kind, shape), name
    assert "inverse" not in batch
    assert set(batch["segment"].tolist()) == {-1, 0, 1, 2}
    assert 0 <= batch["colour"].min() <= batch["colour"].max() <= 1
    start = 0
    for end in batch["offset"].tolist():
        own = batch["grid_coord"][start:end]
        assert own.min(0).values.tolist() == [0, 0, 0]
        assert len(own.unique(dim=0)) == len(own), "more than one point in a voxel"
        middle = batch["coord"][start:end, :2].amin(0) + batch["coord"][start:end, :2].amax(0)
        assert_close(middle, torch.zeros(2), atol=1e-5, rtol=0)
        start = end


def test_evaluation_leads_back_to_the_points_of_the_files(root: Path) -> None:
    data = tiny_scenes(root, eval_batch_size=2)
    (batch,) = data.val_dataloader()
    start, voxels = 0, 0
    for number, end in enumerate(batch["original_offset"].tolist()):
        scene = root / "val" / batch["name"][number]
        coord = torch.from_numpy(np.load(scene / "coord.npy"))
        labels = torch.from_numpy(np.load(scene / "segment.npy"))
        assert torch.equal(batch["original_coord"][start:end], coord)
        assert torch.equal(batch["original_segment"][start:end], labels)
        rows = batch["inverse"][start:end]
        assert set(rows.tolist()) == set(range(voxels, int(batch["offset"][number])))
        # A point lies in its voxel, so no further from the point that stands for it than across.
        moved = batch["coord"][rows] - coord
        spread = (moved - moved.mean(0)).norm(dim=1)
        assert spread.max() < 2 * 0.05 * 3**0.5
        assert spread.mean() < 0.05
        start, voxels = end, int(batch["offset"][number])
    assert batch["votes"] == 1
    # The first point of the voxel has that point's own class.
    first = {int(row): place for place, row in reversed(list(enumerate(batch["inverse"].tolist())))}
    places = torch.tensor([first[row] for row in range(len(batch["segment"]))])
    assert torch.equal(batch["segment"], batch["original_segment"][places])


def test_draws_are_a_function_of_seed_epoch_and_index(root: Path) -> None:
    one, other = tiny_scenes(root), tiny_scenes(root)
    loader = other.train_dataloader()
    first = batches(one)
    assert_equal_batches(first, list(loader))
    second = list(loader)
    scene = first[0]["name"][0]
    again = next(b for b in second if scene in b["name"])
    assert first[0]["coord"].shape != again["coord"].shape or not torch.equal(
        first[0]["coord"], again["coord"]
    )
    assert_equal_batches(first, batches(tiny_scenes(root, num_workers=1)))
    changed = batches(tiny_scenes(root, seed=1))
    assert [b["name"] for b in changed] != [b["name"] for b in first]


def test_resumes_in_the_middle_of_an_epoch(root: Path) -> None:
    whole = batches(tiny_scenes(root))
    loader = tiny_scenes(root).train_dataloader()
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    resumed = tiny_scenes(root).train_dataloader()
    resumed.load_state_dict(state)
    assert_equal_batches(whole[1:], list(resumed))


def test_without_augmentation_a_scene_never_changes(root: Path) -> None:
    data = tiny_scenes(root, augment=False, max_points=120)
    assert data.is_fixed
    loader = data.train_dataloader()
    seen: dict[str, torch.Tensor] = {}
    for batch in [*loader, *loader, *data.train_eval_dataloader()]:
        for name, part in zip(batch["name"], _parts(batch), strict=True):
            assert torch.equal(seen.setdefault(name, part), part)
            assert len(part) == 120
    assert len(seen) == 6
    assert not tiny_scenes(root).is_fixed


@pytest.mark.parametrize(("augment", "memory"), [(False, 2**20), (False, 0), (True, 2**20)])
def test_scenes_that_never_change_are_read_once(
    augment: bool, memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamodules.paired_2d3d.labelled_splits._KEPT_BYTES", memory)
    tree = write_tree(tmp_path, (2, 1, 1))
    loader = tiny_scenes(tree, augment=augment).train_dataloader()
    first = _scenes(loader)
    for file in tree.glob("train/*/coord.npy"):
        file.unlink()
    if augment or not memory:
        with pytest.raises(DataError, match=r"coord\.npy: no such file"):
            list(loader)
        return
    second = _scenes(loader)
    assert first.keys() == second.keys()
    assert all(torch.equal(part, second[name]) for name, part in first.items())


def _scenes(loader: Iterable[LabelledBatch]) -> dict[str, torch.Tensor]:
    pairs = [zip(batch["name"], _parts(batch), strict=True) for batch in loader]
    return dict(pair for batch in pairs for pair in batch)


def _parts(batch: LabelledBatch) -> list[torch.Tensor]:
    rows = torch.cat([batch["coord"], batch["colour"], batch["segment"][:, None]], 1)
    return list(rows.tensor_split(batch["offset"][:-1].tolist()))


def test_few_scenes_are_the_same_for_every_seed(root: Path) -> None:
    names = [
        sorted(n for b in data.train_eval_dataloader() for n in b["name"])
        for data in (
            tiny_scenes(root, train_scenes=2),
            tiny_scenes(root, train_scenes=2, seed=7),
            tiny_scenes(root, train_scenes=4),
        )
    ]
    assert names[0] == names[1]
    assert set(names[0]) < set(names[2])
    assert len(names[2]) == 4


def test_mix3d_joins_clouds_in_pairs(root: Path) -> None:
    alone = batches(tiny_scenes(root, batch_size=3))[0]
    mixed = batches(tiny_scenes(root, batch_size=3, mix3d=1.0))[0]
    assert torch.equal(alone["coord"], mixed["coord"])
    assert mixed["offset"].tolist() == [alone["offset"][1], alone["offset"][2]]
    pair = batches(tiny_scenes(root, batch_size=2, mix3d=1.0))[0]
    assert len(pair["offset"]) == 1


def test_votes_hold_every_point_in_every_copy(root: Path) -> None:
    plain = next(iter(tiny_scenes(root, eval_batch_size=3).test_dataloader()))
    batch = next(iter(tiny_scenes(root, eval_batch_size=3, tta=True).test_dataloader()))
    assert batch["votes"] == VOTES == 13
    assert len(batch["offset"]) == 3 * VOTES
    assert len(batch["inverse"]) == VOTES * len(plain["inverse"])
    assert torch.equal(batch["original_segment"], plain["original_segment"])
    size = int(batch["original_offset"][0])
    copies = batch["coord"][batch["inverse"][: size * VOTES]].reshape(VOTES, size, 3)
    spans = (copies.amax(1) - copies.amin(1))[:, 2]  # height is changed by scale alone
    heights = spans / spans[4]
    assert_close(heights[:4].mean(), torch.tensor(0.95), atol=0.03, rtol=0)
    assert_close(heights[8:12].mean(), torch.tensor(1.05), atol=0.03, rtol=0)
    shapes = {tuple(copy.round(decimals=4).flatten().tolist()) for copy in copies}
    assert len(shapes) == VOTES, "two copies are the same"


def cloud(points: int = 400, seed: int = 0) -> LabelledCloud:
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(points, 3)).astype(np.float32)
    return LabelledCloud(
        rng.uniform(-1, 1, (points, 3)).astype(np.float32),
        rng.uniform(0.2, 0.8, (points, 3)).astype(np.float32),
        normal / np.linalg.norm(normal, axis=1, keepdims=True),
        rng.integers(0, 3, points),
    )


def test_augmentation_moves_points_rigidly_but_for_scale() -> None:
    options = LabelledAugmentation(turn_chance=1, jitter=0, drop_chance=0, colour_noise=0)
    original = cloud()
    for seed in range(8):
        changed = augment(original, options, np.random.default_rng(seed))
        before = np.linalg.norm(original.coord[1:] - original.coord[:-1], axis=1)
        after = np.linalg.norm(changed.coord[1:] - changed.coord[:-1], axis=1)
        ratio = after / before
        assert 0.9 <= ratio.mean() <= 1.1
        assert np.ptp(ratio) < 1e-4
        # Normals are turned by the same matrix as coordinates, and not scaled.
        turn = np.linalg.lstsq(original.coord, changed.coord, rcond=None)[0] / ratio.mean()
        np.testing.assert_allclose(original.normal @ turn, changed.normal, atol=1e-4)
        assert 0 <= changed.colour.min() <= changed.colour.max() <= 1
        assert not np.array_equal(changed.colour, original.colour)


def test_augmentation_that_is_off_changes_nothing() -> None:
    off = LabelledAugmentation(
        turn_chance=0, tilt=0, scale=(1, 1), flip_chance=0, jitter=0, drop_chance=0,
        contrast_chance=0, tint=0, colour_noise=0,
    )  # fmt: skip
    original = cloud()
    changed = augment(original, off, np.random.default_rng(1))
    np.testing.assert_allclose(changed.coord, original.coord, atol=1e-6)
    np.testing.assert_allclose(changed.colour, original.colour, atol=1e-6)
    np.testing.assert_allclose(changed.normal, original.normal, atol=1e-6)
    assert np.array_equal(changed.segment, original.segment)


def test_dropping_leaves_out_a_fifth() -> None:
    original = cloud(4000)
    options = LabelledAugmentation(drop_chance=1)
    kept = len(augment(original, options, np.random.default_rng(0)).segment)
    assert 3100 < kept < 3300


def test_crop_takes_the_nearest_points() -> None:
    original = cloud()
    cropped = crop_sphere(original, 50, np.random.default_rng(0))
    centre = original.coord[np.random.default_rng(0).integers(400)]
    nearest = np.sort(np.linalg.norm(original.coord - centre, axis=1))[:50]
    own = np.sort(np.linalg.norm(cropped.coord - centre, axis=1))
    np.testing.assert_allclose(own, nearest)


def test_names_of_classes(root: Path, tmp_path: Path) -> None:
    assert tiny_scenes(root).class_names == CLASSES
    assert tiny_scenes(root).num_classes == 3
    assert tiny_scenes(root, class_names=("a", "b", "c", "d")).num_classes == 4
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"no classes\.json"):
        tiny_scenes(tmp_path).num_classes  # noqa: B018 - the property raises


def test_missing_colours_and_normals_are_zero(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, (2, 1, 1))
    for file in tree.glob("*/*/color.npy"):
        file.unlink()
    for file in tree.glob("*/*/normal.npy"):
        file.unlink()
    batch = batches(tiny_scenes(tree, augment=False))[0]
    assert batch["colour"].abs().max() == 0
    assert batch["normal"].abs().max() == 0


def _broken(tree: Path, case: str) -> None:
    file = tree / "train" / "scene0" / "segment.npy"
    labels = np.load(file)
    if case == "missing":
        file.unlink()
    elif case == "short":
        np.save(file, labels[:-1])
    elif case == "class":
        np.save(file, np.where(labels == 2, 9, labels))
    elif case == "split":
        (tree / "classes.json").write_text(json.dumps(CLASSES))
        for scene in (tree / "train").iterdir():
            (scene / "coord.npy").unlink()


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("missing", r"segment\.npy: no such file"),
        ("short", r"279 rows, but coord\.npy has 280"),
        ("class", "label 9, but there are 3 classes"),
        ("split", r"train: no scene, expected train/<scene>/coord\.npy .*test, val"),
    ],
)
def test_broken_trees_end_in_one_line(case: str, expected: str, tmp_path: Path) -> None:
    tree = write_tree(tmp_path, (2, 1, 1))
    _broken(tree, case)
    with pytest.raises(DataError, match=expected) as caught:
        batches(tiny_scenes(tree))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"grid_size": 0.0}, "grid_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"train_scenes": 0}, "train_scenes"),
        ({"mix3d": 1.5}, "mix3d"),
        ({"mix3d": 0.5, "augment": False}, "mix3d"),
        ({"segment": "../segment"}, "segment"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], named: str, root: Path) -> None:
    with pytest.raises(ValueError, match=f"^{named}=.*data.init_args.{named}"):
        tiny_scenes(root, **options)


def test_missing_root_and_too_few_scenes(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.init_args\.root"):
        tiny_scenes(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="train_scenes=99: there are 6"):
        tiny_scenes(root, train_scenes=99).setup("fit")
    with pytest.raises(DataError, match="leads out of the root"):
        tiny_scenes(root, test_split="../elsewhere").setup("test")
