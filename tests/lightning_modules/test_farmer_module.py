"""FARMER's training module: what is optimised, logged, saved and drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch.testing import assert_close

from lightning_modules.farmer import Farmer
from lightning_modules.randomness import NOISE, device_generator
from models.farmer.affine_block import FlowShape
from models.farmer.dequantization import bits_per_dim
from models.farmer.guidance import Guidance
from models.farmer.prior import PriorShape
from tests.lightning_modules.farmer_runs import digits, tiny_farmer, tiny_trainer

CONFIGS = Path(__file__).parents[2] / "configs" / "farmer"
MILLION = 1e6


def count(module: torch.nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for p in module.parameters()) / MILLION


def build_on_meta(name: str) -> Farmer:
    """Module of a shipped configuration without memory for its weights."""
    options = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]
    options["flow"] = FlowShape(**options["flow"])
    options["prior"] = PriorShape(**options["prior"])
    options["guidance"] = Guidance(**options["guidance"])
    with torch.device("meta"):
        return Farmer(**options)


def test_paper_sizes() -> None:
    """Parameter counts of table 1 that the stated choices reproduce."""
    small_patch, large_patch = (
        build_on_meta("imagenet256_1b_p8"),
        build_on_meta("imagenet256_1b_p16"),
    )
    assert round(count(small_patch.network.flow), 1) == 828.3
    assert round(count(large_patch.network.flow), 1) == 849.0
    assert round(count(large_patch.network.prior), 1) == 295.6
    assert 1100 < count(large_patch) < 1160
    for name in ("imagenet256_2b_p8", "imagenet256_2b_p16"):
        assert 1400 < count(build_on_meta(name).network.flow) < 1440


def fit(module: Farmer, folder: Path, **changes: Any) -> Trainer:  # noqa: ANN401
    """Train a few steps and return the trainer."""
    trainer = tiny_trainer(folder, **changes)
    trainer.fit(module, digits())
    return trainer


def test_training_step_is_the_mean_negative_log_likelihood(tmp_path: Path) -> None:
    module = tiny_farmer(label_dropout=0.0)
    fit(module, tmp_path)
    data = digits()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    module.train()
    terms = module.training_step(batch, 7)
    generator = device_generator(module.device, 0, NOISE, module.current_epoch, 7, 0)
    torch.empty(16).uniform_(generator=generator)
    parts = module.likelihood(batch["image"], batch["label"], module.noise_sigma, generator)
    assert_close(terms["loss"], -parts.total.mean() / 64)
    split = terms["informative_nats"] + terms["redundant_nats"] + terms["log_det_nats"]
    assert_close(terms["loss"].detach(), split)


def test_noise_is_a_function_of_its_key(tmp_path: Path) -> None:
    module = tiny_farmer()
    fit(module, tmp_path)
    data = digits()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    module.train()
    torch.manual_seed(1)
    first = module.training_step(batch, 3)["loss"]
    torch.manual_seed(2)
    assert torch.equal(first, module.training_step(batch, 3)["loss"])
    assert not torch.equal(first, module.training_step(batch, 4)["loss"])
    module.hparams["seed"] = 1
    assert not torch.equal(first, module.training_step(batch, 3)["loss"])


def test_noise_level_follows_the_optimiser_step(tmp_path: Path) -> None:
    class Watching(Farmer):
        sigmas: list[float]

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
            self.sigmas.append(self.noise_sigma)

    module = Watching(**tiny_farmer().hparams)
    module.sigmas = []
    fit(module, tmp_path, steps=4, accumulate_grad_batches=2)
    pairs = module.sigmas[::2]
    assert module.sigmas[1::2] == pairs
    assert pairs[0] == pytest.approx(0.1)
    assert pairs == sorted(pairs, reverse=True)
    assert module.noise_sigma == pytest.approx(0.02)


def test_bits_per_dim_uses_uniform_noise_alone(tmp_path: Path) -> None:
    module = tiny_farmer(noise_end=0.3)
    trainer = fit(module, tmp_path)
    (result,) = trainer.validate(module, digits(), verbose=False)
    assert 0 < result["val/bits_per_dim"] < 12
    generator = device_generator(module.device, 0)
    data = digits()
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    module.eval()
    with torch.no_grad():
        parts = module.likelihood(batch["image"], batch["label"], 0.0, generator)
    quiet = bits_per_dim(parts.total, 64, 17).mean()
    assert result["val/bits_per_dim"] == pytest.approx(quiet.item(), abs=0.2)
    assert "val/noisy_nats" in result
    (again,) = trainer.validate(module, digits(), verbose=False)
    assert again == result


def test_checkpoint_holds_everything_sampling_needs(tmp_path: Path) -> None:
    module = tiny_farmer(guidance=Guidance(1.5))
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Farmer.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.guidance == Guidance(1.5)
    assert loaded.stretch.fitted
    assert torch.equal(loaded.stretch.edges, module.stretch.edges)
    labels = torch.arange(10)
    samples = module.eval().draw_samples(labels, seed=3)
    assert torch.equal(samples, loaded.eval().draw_samples(labels, seed=3))
    assert not torch.equal(samples, loaded.draw_samples(labels, seed=4))
    levels = (samples + 1) * 8
    assert_close(levels, levels.round())
    assert levels.min() >= 0
    assert levels.max() <= 16


def test_configured_rate_wins_over_the_checkpoint(tmp_path: Path) -> None:
    trainer = fit(tiny_farmer(lr=1e-3), tmp_path, steps=4)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = tiny_farmer(lr=5e-4)
    resumed = tiny_trainer(tmp_path, steps=8)
    resumed.fit(module, digits(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert module.lr_schedulers().base_lrs == [5e-4, 5e-4]


def test_mixed_precision_trains(tmp_path: Path) -> None:
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        module = tiny_farmer()
        fit(module, tmp_path, steps=20, precision=precision)
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())
        (result,) = tiny_trainer(tmp_path).validate(module, digits(), verbose=False)
        losses[precision] = result["val/bits_per_dim"]
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], abs=0.1)


def test_predict_draws_the_requested_classes(tmp_path: Path) -> None:
    module = tiny_farmer()
    trainer = fit(module, tmp_path)
    outputs = trainer.predict(module, digits())
    labels = torch.cat([out["label"] for out in outputs])
    assert labels.bincount().unique().numel() == 1
    images = torch.cat([out["image"] for out in outputs])
    assert images.shape == (len(labels), 1, 8, 8)
    assert images.isfinite().all()
