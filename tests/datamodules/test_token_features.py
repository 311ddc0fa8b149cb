"""Stored features come in one order whatever the shards, and damaged ones are refused by name."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from safetensors import safe_open
from torch import Tensor

from datamodules import feature_split
from datamodules.errors import DataError
from datamodules.feature_shards import FeatureShard, open_cache
from datamodules.feature_split import FeatureSplit
from datamodules.loading import EpochSampler
from datamodules.token_features import FeatureBatch, TokenFeatures
from tests.datamodules.stored_features import CHANNELS, ORIGIN, cache, features, same, write
from tests.quiet_trainings import SaveAt, quiet_trainer

__all__ = ["cache"]


def indices(batches: Any) -> list[int]:  # noqa: ANN401
    return [index for batch in batches for index in batch["index"].tolist()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_hold_what_was_stored_in_the_order_of_the_seed(
    num_workers: int, cache: Path
) -> None:
    data = TokenFeatures(cache, batch_size=6, num_workers=num_workers, seed=3)
    batches = list(data.train_dataloader())
    expected = EpochSampler(26, 6, seed=3).order(0).tolist()[:24]
    assert indices(batches) == expected
    for batch in batches:
        stored = features(batch["index"].tolist())
        assert batch.keys() == stored.keys()
        assert same(batch, stored)
        assert batch["tokens"].dtype == torch.bfloat16


def test_shards_make_no_difference(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("one_shard")
    write(other, range(26))
    write(other, range(5), split="val")
    left, right = TokenFeatures(cache), TokenFeatures(other)
    assert left.data_fingerprint == right.data_fingerprint
    pairs = zip(left.train_eval_dataloader(), right.train_eval_dataloader(), strict=True)
    assert all(same(a, b) for a, b in pairs)


def test_splits(cache: Path) -> None:
    data = TokenFeatures(cache, eval_batch_size=2)
    assert indices(data.val_dataloader()) == indices(data.test_dataloader()) == list(range(5))
    assert indices(data.train_eval_dataloader()) == list(range(26))
    write(cache, range(7), split="test")
    data = TokenFeatures(cache, eval_batch_size=2)
    assert indices(data.test_dataloader()) == indices(data.predict_dataloader()) == list(range(7))


def test_validation_is_held_out_of_training(tmp_path: Path) -> None:
    write(tmp_path, range(20))
    seen = []
    for seed in (0, 1):
        data = TokenFeatures(tmp_path, batch_size=4, val_size=8, seed=seed)
        held_out, trained = indices(data.val_dataloader()), indices(data.train_dataloader())
        assert sorted(held_out + trained) == list(range(20))
        seen.append((held_out, trained))
    assert seen[0][0] == seen[1][0] != list(range(8))
    assert seen[0][1] != seen[1][1]
    with pytest.raises(ValueError, match="val_size=20: must be less than the 20 training images"):
        TokenFeatures(tmp_path, val_size=20).setup("fit")


def test_what_models_ask_of_data_is_stored(cache: Path) -> None:
    data = TokenFeatures(cache)
    assert (data.encoder_identity, data.channels, data.grid) == (ORIGIN.encoder, 8, (2, 3))
    names = (data.kind_names, data.region_names, data.scene_names, data.source_name)
    assert names == (ORIGIN.kind_names, ORIGIN.region_names, ORIGIN.scene_names, "noise")


def test_fingerprint_changes_with_encoder_and_images(tmp_path: Path) -> None:
    prints = set()
    for number, origin in enumerate((ORIGIN, replace(ORIGIN, encoder="f" * 16))):
        for count in (4, 5):
            root = tmp_path / f"{number}-{count}"
            write(root, range(count), origin=origin)
            prints.add(TokenFeatures(root, val_size=1).data_fingerprint)
    assert len(prints) == 4


def test_features_without_attention(tmp_path: Path) -> None:
    write(tmp_path, range(4), origin=replace(ORIGIN, attention_layer=0))
    batch = next(iter(TokenFeatures(tmp_path, val_size=1).train_eval_dataloader()))
    assert "cls_attention" not in batch


def test_an_unfinished_split_is_not_taken_unasked(tmp_path: Path) -> None:
    write(tmp_path, range(12), count=20)
    write(tmp_path, range(5), split="val")
    data = TokenFeatures(tmp_path, batch_size=4)
    assert len(data.val_dataloader()) == 1
    with pytest.raises(DataError, match="train: holds 12 of 20 images; run the command that made"):
        data.train_dataloader()
    partial = TokenFeatures(tmp_path, batch_size=4, allow_partial=True)
    assert sorted(indices(partial.train_dataloader())) == list(range(12))


def test_a_shard_is_mapped_once_and_not_read_whole(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def count(path: Path, framework: str) -> object:
        opened.append(path.name)
        return safe_open(path, framework)

    monkeypatch.setattr(feature_split, "safe_open", count)
    shards = open_cache(cache)["train"]
    dataset = FeatureSplit(shards)
    assert not opened
    for index in (0, 20, 5, 1, 25):
        dataset[index, 0]
    assert sorted(opened) == sorted(shard.path.name for shard in shards)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(shards[0].path) in maps.read_text()
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own, for spawned workers
    assert not copy._maps
    assert same(copy[7, 0], dataset[7, 0])


@pytest.mark.parametrize(
    ("option", "value"), [("batch_size", 0), ("eval_batch_size", 0), ("val_size", 0), ("seed", -1)]
)
def test_arguments_out_of_range(option: str, value: int, cache: Path) -> None:
    expected = rf"{option}={value}: must be >= \d \(data.init_args.{option}\)"
    with pytest.raises(ValueError, match=expected):
        TokenFeatures(cache, **{option: value})


def test_no_features(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; make the features fir"):
        TokenFeatures(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"train/features-rank0-00000.safetensors; make the feat"):
        TokenFeatures(tmp_path).setup("fit")


class Fit(LightningModule):
    """Linear regression from features to complexity, whose steps are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(CHANNELS, 1)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: FeatureBatch, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch["index"].tolist()))
        guess = self.layer(batch["tokens"].float().mean(1))[:, 0]
        return (guess - batch["complexity"]).square().mean()

    def validation_step(self, batch: FeatureBatch, batch_idx: int) -> None:
        self.validated = batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def fit(root: Path, *callbacks: Callback, resume: Path | None = None, workers: int = 0) -> Fit:
    module, data = Fit(), TokenFeatures(root, batch_size=4, num_workers=workers)
    trainer = quiet_trainer(
        root,
        max_epochs=2,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (4, 2), (9, 0)])
def test_training_resumes_mid_epoch_bit_for_bit(step: int, workers: int, cache: Path) -> None:
    path = cache / "step.ckpt"
    whole = fit(cache, SaveAt(path, step))
    resumed = fit(cache, resume=path, workers=workers)
    assert resumed.seen == whole.seen[step:]
    assert resumed.validated == list(range(5))
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert torch.equal(resumed.layer.bias, whole.layer.bias)


def test_shards_are_readable_by_others(cache: Path) -> None:
    (cache / "plain").touch()
    shards: list[FeatureShard] = open_cache(cache)["train"]
    modes = {shard.path.stat().st_mode for shard in shards}
    assert modes == {(cache / "plain").stat().st_mode}
