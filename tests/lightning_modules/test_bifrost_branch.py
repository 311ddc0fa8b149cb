"""Stage A of Bifrost-1: what it trains, logs, keeps and refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.testing import assert_close

from datamodules.keyed_random import keyed_generator
from lightning_modules.bifrost_branch import BifrostBranch
from lightning_modules.bifrost_frozen import DemoFoundation, QwenFoundation
from lightning_modules.bifrost_generation import read_branch
from lightning_modules.bifrost_options import BifrostOptimisation, BranchShape
from lightning_modules.callbacks.latent_store import LatentStore
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.randomness import NOISE
from models.bifrost.checkpoint import save_branch
from models.bifrost.decoding import DecodingOptions
from models.bifrost.generator import predict
from models.bifrost.language_model import weights_digest
from models.bifrost.masking import MaskRatio, training_mask
from tests.lightning_modules.bifrost_runs import (
    folder,
    pairs,
    root,
    saved,
    tiny_branch,
    tiny_trainer,
    write_foundations,
)
from tests.models.bifrost_networks import vision_language_model
from tests.models.test_bifrost_prompts import tokenizer

__all__ = ["folder", "root"]

LOGGED = {"train/loss", "val/loss", "val/mse", "val/mse_mean", "val/cosine", "val/r1", "val/r5"}


class Gradients(Callback):
    """Notes which parameters have had a gradient other than zero."""

    def __init__(self) -> None:
        self.reached: set[str] = set()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reached |= {
            name
            for name, parameter in pl_module.named_parameters()
            if parameter.grad is not None and bool(parameter.grad.any())
        }


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_trains_and_validates_beside_frozen_parts(
    precision: Any,  # noqa: ANN401
    folder: Path,
    root: Path,
    tmp_path: Path,
) -> None:
    module, gradients = tiny_branch(folder), Gradients()
    model, tower = module.foundation.language_model, module.foundation.tower
    ids, mask = module.foundation.prompts(["red bar", ""])
    before = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    digests = weights_digest(model.model), weights_digest(tower.network)
    start = {name: value.clone() for name, value in module.named_parameters()}
    options = {"precision": precision, "val_check_interval": 3, "callbacks": [gradients]}
    trainer = tiny_trainer(tmp_path, 3, **options)
    trainer.fit(module, pairs(root))
    assert gradients.reached == set(start), "gradient within three steps"
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, start[name]), f"{name} was not trained"
    assert (weights_digest(model.model), weights_digest(tower.network)) == digests
    after = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(before, after), "understanding is what it was, bit for bit"
    metrics = trainer.callback_metrics
    assert set(metrics) >= LOGGED | {f"val/reveal_{k}" for k in range(4)}
    assert float(metrics["val/chance_r1"]) == pytest.approx(1 / 8)
    assert all(bool(value.isfinite()) for value in metrics.values())


def test_first_loss_is_that_of_the_keyed_mask(folder: Path, root: Path, tmp_path: Path) -> None:
    class Kept(BifrostBranch):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
            seen.append((batch, super().training_step(batch, batch_idx)))
            return seen[-1][1]

    seen: list[tuple[Any, Tensor]] = []
    torch.manual_seed(0)
    options: dict[str, Any] = {"mask_ratio": MaskRatio(0.3, 0.6), "loss_on": "masked"}
    module = Kept(
        DemoFoundation(folder), optimisation=BifrostOptimisation(lr=1e-9, warmup_steps=1),
        decoding=DecodingOptions(2), **options,
    )  # fmt: skip
    data = pairs(root, caption_dropout=0.5)
    tiny_trainer(tmp_path, 2, limit_val_batches=0).fit(module, data)
    for step, (batch, loss) in enumerate(seen):
        assert "" in batch["caption"]
        latents = module.foundation.latents(batch["image"])
        text = module.foundation.text_states(batch["caption"])
        generator = keyed_generator(0, NOISE, 0, step, 0)
        mask = training_mask(8, 4, generator, MaskRatio(0.3, 0.6))
        model = module.foundation.language_model
        prediction = predict(module.branch, model, latents, mask, text)
        assert_close(loss, (prediction - latents)[mask].square().mean(), atol=1e-5, rtol=1e-4)


def test_noise_is_shown_but_not_learnt(folder: Path, root: Path, tmp_path: Path) -> None:
    """With everything hidden the noise changes nothing; with something shown it does."""
    losses = {}
    for low in (0.25, 1.0):
        for noise in (0.0, 2.0):
            ratio = MaskRatio(low, low, deviation=0)
            module = tiny_branch(folder, mask_ratio=ratio, latent_noise=noise)
            trainer = tiny_trainer(tmp_path, 1, limit_val_batches=0)
            trainer.fit(module, pairs(root))
            losses[low, noise] = float(trainer.callback_metrics["train/loss"])
    assert losses[1.0, 0.0] == losses[1.0, 2.0]
    assert losses[0.25, 0.0] != losses[0.25, 2.0]


def test_captions_are_learnt_by_heart(folder: Path, root: Path, tmp_path: Path) -> None:
    module = tiny_branch(folder, optimisation=BifrostOptimisation(lr=1e-2, warmup_steps=5))
    data = pairs(root, batch_size=24, caption_dropout=0.0)
    trainer = tiny_trainer(tmp_path, 100, limit_val_batches=0)
    trainer.fit(module, data)
    batch = data.gallery("train", 24)
    truth = module.foundation.latents(batch["image"])
    keys = [(n,) for n in range(24)]
    generated = module.generator.generate(batch["caption"], keys, module.decoding)
    error, baseline = (generated - truth).square().mean(), (module.latent_mean - truth).square()
    assert error < 0.5 * baseline.mean(), "without captions the mean latent is the best answer"
    assert_close(module.latent_mean, truth.mean(0), atol=1e-5, rtol=1e-4)


def test_queries_that_read_no_latents(folder: Path, root: Path, tmp_path: Path) -> None:
    shape = BranchShape(queries="learned_2d")
    module = tiny_branch(folder, shape=shape, decoding=DecodingOptions(1))
    trainer = tiny_trainer(tmp_path, 2, val_check_interval=2)
    trainer.fit(module, pairs(root))
    assert not any(name.startswith("val/reveal") for name in trainer.callback_metrics)


def test_checkpoint_holds_no_frozen_weights(folder: Path, root: Path, tmp_path: Path) -> None:
    module = tiny_branch(folder)
    path = saved(module, root, tmp_path / "two.ckpt")
    content = torch.load(path, weights_only=True)
    assert content["frozen_identities"] == module.foundation.identities
    own = {name for name in content["state_dict"] if name.startswith("branch.")}
    assert set(content["state_dict"]) - own == {"latent_mean", "latent_mean_known"}
    assert len(own) == len(module.branch.state_dict())
    again = read_branch(path, DemoFoundation(folder))
    for name, value in again.state_dict().items():
        assert torch.equal(value, module.branch.state_dict()[name]), name
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_other_frozen_parts_are_refused(folder: Path, root: Path, tmp_path: Path) -> None:
    path = saved(tiny_branch(folder), root, tmp_path / "two.ckpt")
    other = write_foundations(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match="was trained beside"):
        tiny_trainer(tmp_path, 4).fit(tiny_branch(other), pairs(root), ckpt_path=path)
    with pytest.raises(CheckpointError, match="was trained beside"):
        read_branch(path, DemoFoundation(other))


def test_branch_from_the_released_layout(folder: Path, root: Path, tmp_path: Path) -> None:
    first = tiny_branch(folder)
    saved(first, root, tmp_path / "two.ckpt")
    save_branch(tmp_path / "released", first.branch)
    second = tiny_branch(folder, pretrained=tmp_path / "released")
    options = {"limit_train_batches": 0, "limit_val_batches": 0}
    tiny_trainer(tmp_path, 1, **options).fit(second, pairs(root))
    found = read_branch(tmp_path / "released", first.foundation)
    for name, value in first.branch.state_dict().items():
        assert torch.equal(second.branch.state_dict()[name], value), name
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.parametrize("text", [False, True])
def test_stored_rows_train_as_those_in_memory(
    text: bool, folder: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ("latents", "text") if text else ("latents", "packed")
    trained = []
    for run in range(3):
        store = LatentStore(tmp_path / "store", parts, dtype="float32")
        module = tiny_branch(folder, memory_mb=0 if run else 64)
        if run == 2:  # what is stored is not made again
            monkeypatch.setattr(TowerStub, "calls", 0)
            monkeypatch.setattr(type(module.foundation.tower), "_encode", TowerStub._encode)
        options = {"callbacks": [store] if run else [], "limit_val_batches": 0}
        tiny_trainer(tmp_path, 4, **options).fit(module, pairs(root, caption_dropout=0.3))
        trained.append(module.branch.state_dict())
    for other in trained[1:]:
        for name, value in trained[0].items():
            assert_close(other[name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert TowerStub.calls == 0


class TowerStub:
    """A tower that counts how often it is asked."""

    calls = 0

    def _encode(self, images: Tensor) -> Tensor:
        TowerStub.calls += 1
        raise AssertionError("the latents are stored")


def test_rows_of_another_tower_are_refused(folder: Path, root: Path, tmp_path: Path) -> None:
    store = LatentStore(tmp_path / "store", ("latents",))
    options: dict[str, Any] = {"limit_val_batches": 0}
    tiny_trainer(tmp_path, 1, callbacks=[store], **options).fit(tiny_branch(folder), pairs(root))
    other = tiny_branch(write_foundations(tmp_path / "other", seed=5))
    data = pairs(root, features=tmp_path / "store")
    with pytest.raises(CheckpointError, match="the data holds latents of"):
        tiny_trainer(tmp_path, 1, **options).fit(other, data)


def test_images_that_vary_are_not_kept(folder: Path, root: Path, tmp_path: Path) -> None:
    module = tiny_branch(folder)
    data = pairs(root, random_flip=True)
    tiny_trainer(tmp_path, 1, limit_val_batches=0).fit(module, data)
    batch = data.gallery("train", 4)
    turned: Any = {**batch, "image": batch["image"].flip(3)}
    assert not torch.equal(module.latents(turned, True), module.latents(batch, True))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"decoding": DecodingOptions(5)}, "steps=5: must be at most the 4"),
        ({"latent_noise": -1.0}, "latent_noise=-1.0"),
        ({"validation_items": 0}, "validation_items=0"),
        ({"statistics_items": 0}, "statistics_items=0"),
    ],
)
def test_bad_numbers_are_named(options: dict[str, Any], named: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        tiny_branch(folder, **options)


def test_qwen_folder(root: Path, tmp_path: Path) -> None:
    chat = tokenizer()
    model = vision_language_model(text={"vocab_size": len(chat)})
    model.save_pretrained(tmp_path / "qwen")
    chat.save_pretrained(tmp_path / "qwen")
    foundation = QwenFoundation(tmp_path / "qwen", 56, 160, dtype="float32")
    module = tiny_branch(foundation)
    saved(module, root, tmp_path / "two.ckpt")
    assert module.branch.shape.hidden == foundation.tower.width == 64
    short = foundation.prompts(["The image shows a fox"]).input_ids
    assert torch.equal(short, foundation.prompts(["A fox"]).input_ids)
    alone = QwenFoundation(tmp_path / "qwen", 56, dtype="float32", tower_only=True)
    assert alone.identities == {"tower": foundation.identities["tower"]}
    with pytest.raises(ValueError, match="tower_only=True"):
        _ = alone.language_model
    with pytest.raises(FileNotFoundError, match="no such folder; download"):
        QwenFoundation(tmp_path / "absent")
