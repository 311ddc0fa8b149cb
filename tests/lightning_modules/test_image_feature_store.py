"""Features of all images, encoded once and shared by runs, processes and epochs."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch.testing import assert_close

from datamodules.errors import DataError
from datamodules.paired_2d3d.image_features import DESCRIPTION, FEATURES, ImageFeatures
from datamodules.paired_2d3d.images import ImageAugmentation
from datamodules.paired_2d3d.paired_scenes import PairedScenes
from lightning_modules.callbacks import image_feature_store
from lightning_modules.callbacks.image_feature_store import ImageFeatureStore
from lightning_modules.concerto import ConcertoPretraining
from tests.datamodules.paired_roots import paired_root, write_scene, write_split
from tests.lightning_modules.concerto_runs import (
    scenes,
    tiny_concerto,
    tiny_encoder,
    tiny_trainer,
    tree,
)
from tests.lightning_modules.test_concerto_distributed import two_processes

__all__ = ["tree"]  # a fixture


@contextmanager
def counted(module: ConcertoPretraining) -> Iterator[list[int]]:
    """Numbers of images that the encoder is given at a time."""
    seen: list[int] = []
    encoder = module.encoder
    assert encoder is not None
    handle = encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    yield seen
    handle.remove()


def fit(
    folder: Path, data: PairedScenes, module: ConcertoPretraining | None = None, **options: Any  # noqa: ANN401
) -> list[int]:  # fmt: skip
    """One training step with stored features; how many images were encoded at a time."""
    module = module or tiny_concerto()
    callbacks = [ImageFeatureStore(folder, options.pop("batch_size", 16))]
    trainer = tiny_trainer(folder.parent, 1, limit_val_batches=0, callbacks=callbacks, **options)
    with counted(module) as seen:
        trainer.fit(module, data)
    return seen


def stored(folder: Path) -> ImageFeatures:
    (only,) = (path for path in folder.iterdir() if not path.name.startswith("."))
    return ImageFeatures(only)


def test_images_are_encoded_once(tree: Path, tmp_path: Path) -> None:
    data, folder = scenes(tree), tmp_path / "features"
    assert fit(folder, data) == [10, 10]  # 10 rooms with two photographs
    (batch,) = [next(iter(data.train_dataloader()))]
    assert "image" not in batch
    assert fit(folder, scenes(tree)) == []
    assert sorted(path.name for path in folder.glob("*/*")) == [DESCRIPTION, FEATURES]
    assert not list(folder.glob(".*")), "what was written under another name is gone"
    assert fit(folder, scenes(tree), tiny_concerto(encoder=tiny_encoder(1))) == [10, 10]
    assert len(list(folder.iterdir())) == 2


def test_features_are_the_encoders_in_half_precision(tree: Path, tmp_path: Path) -> None:
    data, module = scenes(tree), tiny_concerto()
    fit(tmp_path / "features", data, module, batch_size=7)
    features = stored(tmp_path / "features")
    assert features.encoder == module.encoder.identity
    assert features.images == data.image_paths()
    found = torch.from_numpy(features.tokens(np.arange(len(features.images))))
    expected = torch.cat(
        [module.encoder(b["image"] * 2 - 1).tokens for b in data.image_batches(data.image_paths())]
    )
    assert_close(found, expected.half(), atol=1e-3, rtol=1e-3)
    assert expected.std() > 0.1


@pytest.mark.parametrize("standardise", [False, True])
def test_losses_are_those_of_encoding_in_every_step(
    standardise: bool, tree: Path, tmp_path: Path
) -> None:
    losses = []
    for stores in (False, True):
        torch.manual_seed(0)
        module = tiny_concerto(standardise_targets=standardise, statistics_images=16)
        callbacks = [ImageFeatureStore(tmp_path / "features")] if stores else []
        trainer = tiny_trainer(tmp_path, 4, callbacks=callbacks)
        trainer.fit(module, scenes(tree))
        losses.append([float(trainer.callback_metrics[f"{n}/cross"]) for n in ("train", "val")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != losses[1]


def test_runs_that_begin_at_once_do_not_disturb_each_other(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run begins and ends in the middle of the first one's encoding."""
    folder, others = tmp_path / "features", []
    encode = ConcertoPretraining.encode_images

    def interrupted(self: ConcertoPretraining, images: torch.Tensor) -> torch.Tensor:
        if not others:
            others.append(None)
            others[0] = fit(folder, scenes(tree))
        return encode(self, images)

    monkeypatch.setattr(ConcertoPretraining, "encode_images", interrupted)
    module, data = tiny_concerto(), scenes(tree)
    assert fit(folder, data, module) == [10, 10]
    assert others == [[10, 10]]
    assert len(list(folder.iterdir())) == 1
    features = stored(folder)
    batch = next(iter(data.image_batches(data.image_paths())))
    found = torch.from_numpy(features.tokens(batch["image_index"].numpy()))
    assert_close(found.float(), encode(module, batch["image"]), atol=1e-3, rtol=1e-3)


def test_new_images_are_encoded_and_running_trainings_keep_theirs(tmp_path: Path) -> None:
    root, folder = paired_root(tmp_path / "rooms", train=2, val=1), tmp_path / "features"
    data = scenes(root)
    assert fit(folder, data) == [6]
    running = data._features()
    assert running is not None
    before = running.tokens(np.arange(6))
    items = json.loads((root / "splits" / "train.json").read_text())
    new = {"a_room_0": write_scene(root, "train", "a_room", seed=9)}  # ahead of the others
    write_split(root, "train", {**new, **items})
    assert sum(fit(folder, scenes(root))) == 8
    again = pickle.loads(pickle.dumps(running))  # noqa: S301 - as a loader's process gets it
    assert np.array_equal(again.tokens(np.arange(6)), before)


def test_image_of_another_size_is_another_image(tmp_path: Path) -> None:
    root, folder = paired_root(tmp_path / "rooms", train=2, val=1), tmp_path / "features"
    fit(folder, scenes(root))
    (root / "images/train/train0/color/0.png").write_bytes(
        (root / "images/val/val0/color/1.png").read_bytes()
    )
    assert fit(folder, scenes(root)) == [6]
    paths = scenes(root).image_paths()
    digests = {image_feature_store._image_digest(root, paths, pixels) for pixels in (14, 16)}
    assert len(digests) == 2


def test_embedded_rooms_stay_as_they_are(tmp_path: Path) -> None:
    """A file more in their folder would count as damage, and they would be made again."""
    options: dict[str, Any] = {"procedural_rooms": (2, 1, 0, 0), "cache_dir": tmp_path / "cache"}
    data, module = scenes(None, **options), tiny_concerto()
    trainer = tiny_trainer(tmp_path, 1, limit_val_batches=0, callbacks=[ImageFeatureStore()])
    trainer.fit(module, data)
    root = data.root_folder
    files = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    beside = root.with_name(f"{root.name}-features")
    assert len(stored(beside).images) == 9
    again = scenes(None, **options)
    trainer = tiny_trainer(tmp_path, 1, limit_val_batches=0, callbacks=[ImageFeatureStore()])
    with counted(module) as seen:
        trainer.fit(module, again)
    assert seen == []
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == files


def test_encoding_that_fails_leaves_nothing_behind(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, folder = shutil.copytree(tree, tmp_path / "rooms"), tmp_path / "features"
    picture = root / "images/val/val1/color/1.png"
    content = picture.read_bytes()
    picture.write_bytes(content[:100])
    with pytest.raises(DataError, match=r"1\.png"):
        fit(folder, scenes(root))
    assert list(folder.iterdir()) == []
    picture.write_bytes(content)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(image_feature_store.shutil, "disk_usage", lambda _: full)
    with pytest.raises(DataError, match=r"features of 20 images need 0\.0 GiB"):
        fit(folder, scenes(root))
    monkeypatch.undo()
    assert fit(folder, scenes(root)) == [10, 10]


@pytest.mark.parametrize("case", ["augmented", "other grid"])
def test_what_cannot_be_used_is_said_ahead_of_the_work(
    case: str, tree: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "augmented": {"image_augmentation": ImageAugmentation(offset_chance=0.5)},
        "other grid": {"patch_grid": (3, 3)},
    }[case]
    module = tiny_concerto()
    message = {"augmented": "^image_augmentation=", "other grid": "^patch_grid="}[case]
    trainer = tiny_trainer(tmp_path, 1, callbacks=[ImageFeatureStore(tmp_path / "features")])
    with counted(module) as seen, pytest.raises(ValueError, match=message):
        trainer.fit(module, scenes(tree, **changes))
    assert seen == []


def test_without_use_nothing_is_encoded(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    assert fit(folder, scenes(tree), tiny_concerto("3D only")) == []
    assert fit(folder, scenes(tree, images_per_item=0)) == []
    trial = fit(folder, scenes(tree), fast_dev_run=True)
    assert trial == [4, 4], "the images of its two batches"
    assert not folder.exists()
    with pytest.raises(TypeError, match="LightningModule: ImageFeatureStore serves"):
        ImageFeatureStore(folder).setup(tiny_trainer(tmp_path), LightningModule(), "fit")
    with pytest.raises(ValueError, match=r"^batch_size=0"):
        ImageFeatureStore(folder, batch_size=0)


class CountedStore(ImageFeatureStore):
    """Writes how many images each process encoded."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ANN401
        with counted(pl_module) as seen:
            super().setup(trainer, pl_module, stage)
        (Path(trainer.default_root_dir) / f"seen{trainer.global_rank}").write_text(str(sum(seen)))


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_the_work(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    options: dict[str, Any] = {"limit_val_batches": 0, **two_processes()}
    store = CountedStore(folder, batch_size=3)
    tiny_trainer(tmp_path, 1, callbacks=[store], **options).fit(tiny_concerto(), scenes(tree))
    assert [(tmp_path / f"seen{rank}").read_text() for rank in (0, 1)] == ["10", "10"]
    assert not list(folder.glob(".*"))
    module, data = tiny_concerto(), scenes(tree)
    features = stored(folder)
    for batch in data.image_batches(data.image_paths(), 20):
        found = torch.from_numpy(features.tokens(batch["image_index"].numpy()))
        expected = module.encode_images(batch["image"])
        assert_close(found.float(), expected, atol=1e-3, rtol=1e-3)
