"""Pre-training of Concerto: what is trained, logged, kept and refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.testing import assert_close

from lightning_modules.cli.errors import CheckpointError
from lightning_modules.concerto import ConcertoPretraining
from lightning_modules.concerto_options import ConcertoCourse, ConcertoOptimisation
from tests.lightning_modules.concerto_runs import (
    logged,
    scenes,
    tiny_concerto,
    tiny_encoder,
    tiny_trainer,
    tree,
    watched_run,
    without_images,
)

__all__ = ["tree"]  # a fixture

HEADS = ("student.mask_head", "student.unmask_head")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_trains_and_validates(tree: Path, precision: Any, tmp_path: Path) -> None:  # noqa: ANN401
    module = tiny_concerto(standardise_targets=True, statistics_images=4)
    encoder = {k: v.clone() for k, v in module.encoder.network.state_dict().items()}
    watcher = watched_run(
        module, scenes(tree), tmp_path, 4, precision=precision, limit_val_batches=1.0
    )
    for name, value in watcher.weights[-1].items():
        assert value.isfinite().all(), name
        is_fixed = name.endswith("original0")  # the prototypes' magnitude
        assert torch.equal(value, watcher.weights[0][name]) == is_fixed, name
    for name, value in module.encoder.network.state_dict().items():
        assert torch.equal(value, encoder[name]), f"{name} of the frozen encoder moved"
    metrics = module.trainer.callback_metrics
    terms = {"loss", "mask", "roll_mask", "unmask", "cross"}
    assert {f"{stage}/{term}" for stage in ("train", "val") for term in terms} <= set(metrics)
    assert {"train/cosine", "train/prototypes_used", "course/momentum"} <= set(metrics)
    assert all(value.isfinite() for value in metrics.values())
    weighted = {"mask": 1 / 8, "roll_mask": 1 / 8, "unmask": 2 / 8, "cross": 4 / 8}
    for stage in ("train", "val"):
        total = sum(float(metrics[f"{stage}/{name}"]) * w for name, w in weighted.items())
        assert float(metrics[f"{stage}/loss"]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    ("arm", "untrained"),
    [("joint", ()), ("3D only", ("patch_proj",)), ("images only", HEADS)],
)
def test_all_that_an_arm_trains_gets_gradient(
    arm: str, untrained: tuple[str, ...], tree: Path, tmp_path: Path
) -> None:
    watcher = watched_run(tiny_concerto(arm), scenes(tree), tmp_path)
    start, end = watcher.weights[0], watcher.weights[-1]
    assert len(watcher.gradients) == 3
    for name in start:
        own = name.removeprefix("network.")
        still = own.startswith(("teacher.", *untrained)) or own.endswith("original0")
        seen = [found[name] for found in watcher.gradients]
        if still:
            assert seen == [None] * 3, name
        else:
            assert all(gradient is not None and gradient.abs().max() > 0 for gradient in seen), name
        if not own.startswith("teacher."):
            assert torch.equal(start[name], end[name]) == still, name


def test_checkpoint_holds_student_and_teacher_but_no_image_encoder(
    tree: Path, tmp_path: Path
) -> None:
    module = tiny_concerto()
    watched_run(module, scenes(tree), tmp_path, 1)
    module.trainer.save_checkpoint(tmp_path / "one.ckpt")
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    state = content["state_dict"]
    assert content["encoder_identity"] == module.encoder.identity
    names = {name.removeprefix("network.") for name in state}
    assert {name.split(".")[0] for name in names} == {"student", "teacher", "patch_proj"}
    own = {name.split(".", 1)[1] for name in names if name.startswith("student.")}
    assert own == {name.split(".", 1)[1] for name in names if name.startswith("teacher.")}
    shapes = {tuple(value.shape) for value in state.values()}
    assert (16, 3, 16, 16) not in shapes, "the image encoder's patch embedding"


def test_checkpoint_of_another_encoder_is_refused(tree: Path, tmp_path: Path) -> None:
    module = tiny_concerto()
    watched_run(module, scenes(tree), tmp_path, 1)
    module.trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = tiny_concerto(encoder=tiny_encoder(seed=1))
    with pytest.raises(CheckpointError, match="the checkpoint learnt from features of") as caught:
        tiny_trainer(tmp_path, 4).fit(other, scenes(tree), ckpt_path=tmp_path / "one.ckpt")
    assert "\n" not in str(caught.value)
    built = ConcertoPretraining.load_from_checkpoint(
        tmp_path / "one.ckpt", encoder=tiny_encoder(), weights_only=True
    )
    assert built.shape == module.shape
    assert_close(built.state_dict(), module.state_dict())


@pytest.mark.parametrize("arm", ["joint", "images only"])
@pytest.mark.parametrize("images", ["some", "none"])
def test_batches_without_images_train(arm: str, images: str, tree: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tree, tmp_path / "rooms")
    without_images(root, "train", *(range(8) if images == "none" else (0, 2, 3, 5, 7)))
    without_images(root, "val", *(range(2) if images == "none" else (1,)))
    logger = CSVLogger(tmp_path / "log", "", "")
    module = tiny_concerto(arm, standardise_targets=True, statistics_images=4)
    data = scenes(root, batch_size=1, eval_batch_size=1)
    watcher = watched_run(module, data, tmp_path, 8, logger=logger, limit_val_batches=1.0)
    for found in watcher.gradients:
        for name, parameter in module.named_parameters():
            # A rank would wait for the others if one of its gradients were missing.
            gradient = found[name]
            assert (gradient is not None) == parameter.requires_grad, name
            assert gradient is None or gradient.isfinite().all(), name
    patches = logged(tmp_path / "log", "train/patches")
    assert [bool(value) for value in patches].count(True) == (3 if images == "some" else 0)
    if images == "none":
        proj = "network.patch_proj.weight"
        assert all(found[proj] is not None and not found[proj].any() for found in watcher.gradients)
    metrics = module.trainer.callback_metrics
    assert metrics["val/cross"].isnan() == (images == "none")  # of the room with images alone
    if arm == "joint":
        parts = [logged(tmp_path / "log", f"train/{n}") for n in ("mask", "roll_mask", "unmask")]
        for number, loss in enumerate(logged(tmp_path / "log", "train/loss")):
            if not patches[number]:
                mask, roll, unmask = (values[number] for values in parts)
                assert loss == pytest.approx(2 * (mask / 8 + roll / 8 + unmask / 4), rel=1e-4)


def test_3d_alone_needs_neither_images_nor_encoder(tree: Path, tmp_path: Path) -> None:
    module = tiny_concerto("3D only", encoder=None, standardise_targets=True)
    data = scenes(tree, images_per_item=0, patch_grid=(3, 5))
    watched_run(module, data, tmp_path, 1, limit_val_batches=1.0, val_check_interval=1)
    metrics = module.trainer.callback_metrics
    assert metrics["val/loss"].isfinite()
    assert "val/cross" not in metrics
    assert "train/patches" not in metrics


def test_validation_is_the_same_every_time(tree: Path, tmp_path: Path) -> None:
    module, data = tiny_concerto(), scenes(tree)
    found = [tiny_trainer(tmp_path).validate(module, data, verbose=False) for _ in range(2)]
    assert found[0] == found[1]
    terms = ("loss", "mask", "roll_mask", "unmask", "cross")
    assert set(found[0][0]) == {f"val/{name}" for name in terms}


def test_statistics_are_those_of_the_training_images(tree: Path, tmp_path: Path) -> None:
    module = tiny_concerto(standardise_targets=True, statistics_images=16)
    data = scenes(tree)
    watched_run(module, data, tmp_path, 1)
    batches = list(data.image_batches(data.train_image_paths()))
    tokens = torch.cat([module.encoder(batch["image"] * 2 - 1).tokens for batch in batches])
    assert len(tokens) == 16
    standardiser: Any = module.target_standardiser
    assert_close(standardiser.mean, tokens.flatten(0, 1).mean(0), atol=1e-4, rtol=1e-3)
    found = module.views(next(iter(data.train_dataloader()))).image_tokens
    assert found is not None
    assert found.flatten(0, 1).mean(0).abs().max() < 0.5
    assert found.std() == pytest.approx(1.0, abs=0.2)


def test_another_grid_of_patches_is_refused(tree: Path, tmp_path: Path) -> None:
    data = scenes(tree, patch_grid=(7, 6))
    with pytest.raises(ValueError, match=r"^patch_grid=\(7, 6\): .*patch_grid to \[6, 6\]$"):
        tiny_trainer(tmp_path, 1).fit(tiny_concerto(), data)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"^encoder=null: the cross-modal loss needs"):
        tiny_concerto(encoder=None)
    for wrong, named in (
        ({"lr": 0.0}, "lr=0.0"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"warmup_share": 1.0}, "warmup_share=1.0"),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            ConcertoOptimisation(**wrong)
    for course, named in (
        ({"mask_size": (0.0, 1.0)}, "mask_size="),
        ({"mask_ratio": (0.3, 1.2)}, "mask_ratio="),
        ({"teacher_temperature": (0.0, 0.1)}, "teacher_temperature="),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            ConcertoCourse(**course)
