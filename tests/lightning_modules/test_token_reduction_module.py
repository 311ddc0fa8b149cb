"""Both training stages of token reduction: what they train, log, keep and refuse."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close

from datamodules.documents import DocumentBatch
from lightning_modules.callbacks.collapse_alarm import CollapseAlarm, CollapsedError
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.token_reconstruction import TokenReconstruction
from lightning_modules.token_reduction import TokenReduction
from lightning_modules.token_reduction_options import ReductionOptimisation, ReductionShape
from models.token_reduction.reconstructor import TokenReconstructor
from models.token_reduction.selector import TokenSelector
from tests.lightning_modules.reduction_runs import (
    OPTIMISATION,
    SHAPE,
    documents,
    tiny_encoder,
    tiny_reduction,
    tiny_trainer,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "token_reduction"


def saved(module: TokenReduction, folder: Path, **options: Any) -> Path:  # noqa: ANN401
    """A checkpoint after two steps."""
    trainer = tiny_trainer(folder, 2, limit_val_batches=0, **options)
    trainer.fit(module, documents())
    path = folder / "two.ckpt"
    trainer.save_checkpoint(path)
    return path


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_trains_and_validates(precision: Any, tmp_path: Path) -> None:  # noqa: ANN401
    module = tiny_reduction()
    before = {name: value.clone() for name, value in module.named_parameters()}
    encoder = {k: v.clone() for k, v in module.encoder.network.state_dict().items()}
    trainer = tiny_trainer(tmp_path, 4, precision=precision, val_check_interval=4)
    trainer.fit(module, documents())
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} was not trained"
    for name, value in module.encoder.network.state_dict().items():
        assert torch.equal(value, encoder[name]), f"{name} of the frozen encoder moved"
    metrics = trainer.callback_metrics
    assert {"train/loss", "train/keep", "train/keep_argmax", "train/keep_std"} <= set(metrics)
    assert {"val/nmse_0.25", "val/nmse_0.5", "val/text_recall_0.25", "val/keep"} <= set(metrics)
    assert {"val/keep_page", "val/keep_photograph"} <= set(metrics)
    assert 0 < metrics["val/nmse_0.5"] < metrics["val/nmse_0.25"] * 1.1


def test_statistics_are_those_of_the_training_images(tmp_path: Path) -> None:
    module = tiny_reduction(statistics_images=64)
    data = documents()
    tiny_trainer(tmp_path, 1, limit_val_batches=0).fit(module, data)
    with torch.no_grad():
        batches = list(data.train_eval_dataloader())
        tokens = torch.cat([module.tokens(batch) for batch in batches]).flatten(0, 1)
    assert_close(module.reducer.standardiser.mean, tokens.mean(0), atol=1e-4, rtol=1e-3)
    assert_close(module.reducer.standardiser.std, tokens.std(0, correction=0), atol=1e-4, rtol=1e-3)


def test_checkpoint_holds_no_encoder_but_its_identity(tmp_path: Path) -> None:
    module = tiny_reduction()
    path = saved(module, tmp_path)
    content = torch.load(path, weights_only=True)
    shapes = {tuple(value.shape) for value in content["state_dict"].values()}
    assert content["encoder_identity"] == module.encoder.identity
    assert not any("encoder" in name for name in content["state_dict"])
    assert (16, 3, 16, 16) not in shapes, "the encoder's patch embedding"


def test_checkpoint_of_another_encoder_is_refused(tmp_path: Path) -> None:
    path = saved(tiny_reduction(), tmp_path)
    other = tiny_reduction(encoder=tiny_encoder(seed=1))
    with pytest.raises(CheckpointError, match="hold features of"):
        tiny_trainer(tmp_path, 4).fit(other, documents(), ckpt_path=path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"floor": (0.6, 0.4)}, "floor"),
        ({"temperature": (1.0, 0.01)}, "temperature"),
        ({"shares": (0.0,)}, "shares"),
    ],
)
def test_bad_numbers_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}="):
        tiny_reduction(**options)


def test_price_decides_how_much_is_kept(tmp_path: Path) -> None:
    """A free selector keeps more than one that pays ten times: the sign of the price is right."""
    kept = []
    for price in (0.0, 10.0):
        optimisation = {"lr": 1e-2, "warmup_steps": 1}
        module = tiny_reduction(price=price, floor=(0.0, 0.0), optimisation=optimisation)
        trainer = tiny_trainer(tmp_path, 24, limit_val_batches=0)
        trainer.fit(module, documents())
        kept.append(float(trainer.callback_metrics["train/keep"]))
    assert kept[1] < kept[0] - 0.2


def test_weights_without_decay_are_all_but_the_matrices() -> None:
    module = tiny_reduction(optimisation=ReductionOptimisation(weight_decay=0.01))
    names = {id(p): name for name, p in module.named_parameters()}
    members: dict[bool, set[str]] = {True: set(), False: set()}
    for group in module._groups():
        members[group["weight_decay"] > 0] |= {names[id(p)] for p in group["params"]}
    decayed, kept = members[True], members[False]
    assert decayed | kept == set(names.values())
    assert all(name.endswith("weight") for name in decayed)
    assert {"reconstructor.mask_token", "reducer.selector.head.bias"} <= kept
    assert {
        f"{part}.transformer.positions.table" for part in ("reducer.selector", "reconstructor")
    } <= kept
    assert {"reducer.selector.transformer.norm.weight"} <= kept
    assert {"reconstructor.head.weight", "reducer.selector.head.weight"} <= decayed
    assert len(decayed) == 2 * (4 + 1)


def test_temperature_falls_to_its_end(tmp_path: Path) -> None:
    seen = []

    class Watched(TokenReduction):
        def training_step(self, batch: DocumentBatch, batch_idx: int) -> dict[str, torch.Tensor]:
            seen.append(self._temperature())
            return super().training_step(batch, batch_idx)

    module = Watched(
        tiny_encoder(), SHAPE, temperature=(1.0, 0.5), optimisation=OPTIMISATION, shares=(0.5,)
    )
    tiny_trainer(tmp_path, 5, limit_val_batches=0).fit(module, documents())
    assert seen == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5])


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_collapse_is_noticed(action: Any, tmp_path: Path) -> None:  # noqa: ANN401
    alarm = CollapseAlarm(lowest=0.0, highest=0.0001, patience=5, action=action)
    trainer = tiny_trainer(tmp_path, 12, limit_val_batches=0, callbacks=[alarm])
    module, data = tiny_reduction(), documents(train_size=128)
    if action == "stop":
        with pytest.raises(CollapsedError, match="keeps everything"):
            trainer.fit(module, data)
        assert trainer.global_step < 12
    else:
        with pytest.warns(UserWarning, match="keeps everything"):
            trainer.fit(module, data)


def test_healthy_selector_raises_no_alarm(tmp_path: Path) -> None:
    alarm = CollapseAlarm(patience=1, action="stop")
    trainer = tiny_trainer(tmp_path, 11, limit_val_batches=0, callbacks=[alarm])
    trainer.fit(tiny_reduction(), documents(train_size=128))
    assert trainer.global_step == 11


@pytest.mark.parametrize("selection", ["selector", "random", "cls_attention"])
def test_judge_trains_the_reconstructor_alone(selection: Any, tmp_path: Path) -> None:  # noqa: ANN401
    first = tiny_reduction()
    path = saved(first, tmp_path)
    judge = TokenReconstruction(
        tiny_encoder(), path, selection, shape=SHAPE, optimisation=OPTIMISATION, shares=(0.25,)
    )
    trainer = tiny_trainer(tmp_path, 3, val_check_interval=3)
    trainer.fit(judge, documents())
    for name, value in judge.reducer.state_dict().items():
        assert torch.equal(value, first.reducer.state_dict()[name]), name
    own, start = judge.reconstructor.state_dict(), first.reconstructor.state_dict()
    assert any(not torch.equal(own[name], start[name]) for name in own)
    assert 0 < trainer.callback_metrics["val/nmse_0.25"] < 2


def test_judge_needs_a_first_stage(tmp_path: Path) -> None:
    judge = TokenReconstruction(tiny_encoder(), shape=SHAPE)
    with pytest.raises(CheckpointError, match=r"model\.pretrained"):
        tiny_trainer(tmp_path, 1).fit(judge, documents())


@pytest.mark.parametrize(
    ("name", "channels", "side", "matrices"),
    [
        ("clip_l336_coco", 1024, 24, 3 * 12 * 1024**2),
        ("siglip_so400m_coco", 1152, 27, 3 * (4 * 1152**2 + 2 * 1152 * 4304)),
    ],
)
def test_paper_size_selector_has_the_encoders_sizes(
    name: str, channels: int, side: int, matrices: int
) -> None:
    model = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]
    shape = ReductionShape(**model["shape"]).for_tokens(channels, (side, side))
    with torch.device("meta"):
        selector, reconstructor = TokenSelector(shape), TokenReconstructor(shape)
    for network in (selector, reconstructor):
        weights = [p for n, p in network.transformer.blocks.named_parameters() if p.ndim == 2]
        assert sum(weight.numel() for weight in weights) == matrices
    assert selector.transformer.positions.table.shape == (side, side, channels)
