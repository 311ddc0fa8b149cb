"""Pictures of features in pre-training: where they go, and that weights alone decide them."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from lightning_modules.callbacks.cloud_pictures import CloudPictures
from lightning_modules.concerto import ConcertoPretraining
from lightning_modules.concerto_options import ConcertoOptimisation
from tests.lightning_modules.concerto_runs import SHAPE, scenes, tiny_concerto, tiny_trainer, tree

__all__ = ["tree"]  # a fixture

DROPPING = replace(SHAPE, encoder=replace(SHAPE.encoder, drop_path=0.5))


class Unreachable:
    """In place of W&B: fails whoever uses it."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        raise AssertionError(f"{name}: there is no logger")


def draw(
    module: ConcertoPretraining,
    root: Path,
    folder: Path,
    steps: int = 1,
    callback: CloudPictures | None = None,
    **options: Any,  # noqa: ANN401
) -> list[Path]:
    """Train some steps and draw after each."""
    callbacks = [callback or CloudPictures(clouds=1)]
    options = {"val_check_interval": 1, "limit_val_batches": 1, **options}
    trainer = tiny_trainer(folder, steps, callbacks=callbacks, **options)
    trainer.fit(module, scenes(root, batch_size=1, eval_batch_size=1))
    return sorted((folder / "pictures").glob("*"))


def pixels(path: Path) -> Any:  # noqa: ANN401
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_every_validation_leaves_a_picture(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Unreachable())
    module = tiny_concerto()
    first, second = draw(module, tree, tmp_path, 2)
    assert [path.name for path in (first, second)] == [
        "clouds-step000001.png",
        "clouds-step000002.png",
    ]
    one, two = pixels(first), pixels(second)
    assert one.shape == two.shape
    middle = one.shape[1] // 2
    assert np.array_equal(one[:, : middle - 20], two[:, : middle - 20]), "the same photographs"
    assert not np.array_equal(one[:, middle:], two[:, middle:]), "other features"
    assert len(np.unique(one[:, middle:].reshape(-1, 3), axis=0)) > 50
    assert module.network.student.backbone.training
    taller = pixels(draw(module, tree, tmp_path / "more", 1, CloudPictures(clouds=9))[0])
    assert taller.shape[0] > 1.8 * one.shape[0], "both validation rooms, not nine"


def test_equal_weights_give_equal_pictures_whatever_is_random(tree: Path, tmp_path: Path) -> None:
    still = ConcertoOptimisation(lr=1e-30)  # changes nothing
    module = tiny_concerto(shape=DROPPING, optimisation=still)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        (path,) = draw(module, tree, tmp_path / str(seed))
        found.append(path.read_bytes())
    assert found[0] == found[1]
    with torch.no_grad():
        for parameter in module.network.student.backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (path,) = draw(module, tree, tmp_path / "other")
    assert path.read_bytes() != found[0]


def test_large_clouds_are_thinned_and_nothing_is_dropped(tree: Path) -> None:
    module, data = tiny_concerto(shape=DROPPING), scenes(tree)
    cloud = data.whole_cloud(0)
    drawn = CloudPictures(most_points=100)._colour(module.train(), cloud)
    assert all(part.training for part in module.network.student.backbone.modules())
    assert 50 < len(drawn.coord) <= 100
    assert drawn.features.shape == drawn.colour.shape == drawn.coord.shape
    assert {drawn.features.dtype, drawn.colour.dtype} == {np.dtype(np.uint8)}
    again = CloudPictures(most_points=100)._colour(module, cloud)
    assert np.array_equal(drawn.features, again.features)
    whole = CloudPictures()._colour(module, cloud)
    assert np.array_equal(whole.coord, cloud.coord)


def test_wandb_gets_picture_and_clouds(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    (path,) = draw(tiny_concerto(), tree, tmp_path, logger=logger)
    logger.experiment.finish()
    media = tmp_path.glob("wandb/offline-run-*/files/media")
    (folder,) = media
    (picture,) = folder.glob("images/val/clouds_*.png")
    assert np.array_equal(pixels(picture), pixels(path))
    assert len(list(folder.glob("object3D/val/features_*.pts.json"))) == 1


def test_trials_and_plain_validation_draw_nothing(tree: Path, tmp_path: Path) -> None:
    assert draw(tiny_concerto(), tree, tmp_path, fast_dev_run=True) == []
    trainer = tiny_trainer(tmp_path, callbacks=[CloudPictures()])
    trainer.validate(tiny_concerto(), scenes(tree), verbose=False)
    assert not (tmp_path / "pictures").exists()


def test_wrong_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^LightningModule: CloudPictures draws Concerto only"):
        CloudPictures().on_validation_epoch_end(tiny_trainer(tmp_path), LightningModule())
    with pytest.raises(ValueError, match=r"^clouds=0"):
        CloudPictures(clouds=0)
    with pytest.raises(ValueError, match=r"^most_points=0"):
        CloudPictures(most_points=0)
