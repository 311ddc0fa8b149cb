"""Both training stages of CLiFT: what they train, log, keep and refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from safetensors.torch import save_file
from torch.testing import assert_close

from lightning_modules.callbacks.camera_path_writer import CameraPathWriter
from lightning_modules.callbacks.plane_depth import best_plane_depth
from lightning_modules.callbacks.rendered_views import RenderedViews
from lightning_modules.callbacks.token_budgets import TokenBudgets
from lightning_modules.clift import Clift
from lightning_modules.clift_condensing import CliftCondensing
from models.clift.baselines import warp_plane
from models.clift.checkpoint import export_clift
from models.clift.clift import Clift as CliftNetwork
from models.clift.clift import CliftShape, SceneTokens
from models.clift.scene_file import load_scene, network_identity
from tests.lightning_modules.clift_runs import (
    OPTIMISATION,
    SHAPE,
    room_cache,
    rooms,
    tiny_clift,
    tiny_condensing,
    tiny_trainer,
)

__all__ = ["room_cache"]

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "clift"
PARAMETERS = {
    "re10k_stage1": 81_239_232,
    "re10k_stage2": 89_707_712,
    "re10k_eval": 89_707_712,
    # input_norm, and a norm of queries and one of keys for each of 18 attentions
    "dl3dv_stage1": 81_239_232 + 2 * 768 + 18 * 2 * 96,
    "dl3dv_stage2": 89_707_712 + 2 * 768 + 18 * 2 * 96,
    "own_capture": 89_707_712 + 2 * 768 + 18 * 2 * 96,
}


def batch_of(cache: Path) -> Any:  # noqa: ANN401
    data = rooms(cache)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("name", PARAMETERS)
def test_paper_size_network_has_the_right_parameter_count(name: str) -> None:
    model = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    with torch.device("meta"):
        condense = model["class_path"].endswith("CliftCondensing")
        network = CliftNetwork(CliftShape(**model["init_args"]["shape"]), condense)
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [tiny_clift, tiny_condensing])
def test_trains_and_validates(
    make: Any,  # noqa: ANN401
    precision: Any,  # noqa: ANN401
    room_cache: Path,
    tmp_path: Path,
) -> None:
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = tiny_trainer(tmp_path, 4, precision=precision)
    trainer.fit(module, rooms(room_cache))
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, _ in module.named_parameters()} - frozen
    assert bool(frozen) == isinstance(module, CliftCondensing)
    metrics = trainer.callback_metrics
    assert {"train/loss", "train/psnr", "val/psnr", "val/psnr_0.25", "val/ssim"} <= set(metrics)
    assert all(torch.isfinite(value) for value in metrics.values())


def test_encoder_is_frozen_and_quiet_unless_faithful(room_cache: Path, tmp_path: Path) -> None:
    for faithful in (False, True):
        module = tiny_condensing(faithful_dropout=faithful).train()
        assert module.network.encoder.training is faithful
        assert module.network.decoder.training
    groups = tiny_condensing(renderer_rate=0.5).parameter_groups()
    assert {group["lr"] for group in groups} == {0.004, 0.002, 0.001}
    assert OPTIMISATION.lr == 0.002


@pytest.mark.parametrize("faithful", [False, True])
def test_encoder_keeps_its_mode_from_the_first_step_on(
    faithful: bool, room_cache: Path, tmp_path: Path
) -> None:
    class Modes(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:  # noqa: ANN401
            network = pl_module.network
            seen.append((network.encoder.training, network.decoder.training))

    seen: list[tuple[bool, bool]] = []
    trainer = tiny_trainer(tmp_path, 6, callbacks=[Modes()], val_check_interval=2)
    trainer.fit(tiny_condensing(faithful_dropout=faithful), rooms(room_cache))
    assert seen == [(faithful, True)] * 6


def test_loss_counts_both_terms(room_cache: Path) -> None:
    from lightning_modules.clift_options import CliftLoss

    batch = batch_of(room_cache)
    truth = batch["target"]["image"]
    losses = []
    for loss in (CliftLoss(), CliftLoss("efficientnet_lite0", weight=0.5)):
        module = tiny_clift(loss=loss)
        module.trainer = Trainer(logger=False, accelerator="cpu", log_every_n_steps=10**9)
        module.trainer.fit_loop.epoch_loop._batches_that_stepped = 1
        module.log = lambda *args, **kwargs: None
        module.log_dict = lambda *args, **kwargs: None
        losses.append(float(module.picture_loss(truth * 0.5, truth)))
    assert losses[0] == pytest.approx(float((truth * 0.5).square().mean()))
    assert losses[1] > losses[0] + 0.01
    assert not [key for key in module.state_dict() if "perceptual" in key]


def test_storage_keeps_what_it_says(room_cache: Path) -> None:
    module = tiny_condensing().eval()
    batch = batch_of(room_cache)
    with torch.no_grad():
        scenes = module.encode(batch)
        assert scenes.tokens.shape == (2, 4 * 16, 32)
        kept = {}
        for method in ("random", "kmeans", "mean", "condensed"):
            generator = module.evaluation_generator(3)
            kept[method] = module.store(scenes, method, 0.25, generator)
            assert int(kept[method].valid.sum(1).max()) <= 16
    for name in ("random", "kmeans"):
        apart = kept[name].tokens[:, :, None] - scenes.tokens[:, None]
        nearest = apart.abs().amax(-1).amin(-1)
        assert nearest[kept[name].valid].max() == 0, "a stored token is one of the encoder's"
    # An untrained condenser's last layer is zero: it gives the anchors themselves.
    assert_close(kept["condensed"].tokens, kept["kmeans"].tokens)
    assert not torch.equal(kept["mean"].tokens, kept["kmeans"].tokens)


def test_padded_views_change_nothing(room_cache: Path) -> None:
    module = tiny_clift().eval()
    batch = batch_of(room_cache)
    padded = {**batch, "context": dict(batch["context"])}
    for name, value in batch["context"].items():
        filler = torch.zeros_like(value[:, :1])
        padded["context"][name] = torch.cat([value, filler], 1)
    with torch.no_grad():
        pictures = []
        for one in (batch, padded):
            scene = SceneTokens(*module.encode(one))
            pictures.append(module.render(module.remember(scene), one["target"]))
    assert_close(*pictures, atol=1e-5, rtol=0)


def test_view_and_scene_subsets_render_from_as_many_tokens(room_cache: Path) -> None:
    batch = batch_of(room_cache)
    for subset_per in ("view", "scene"):
        module = tiny_clift(subset_per=subset_per, keep=(0.25, 0.25))
        module.trainer = tiny_trainer(Path(), 1)
        module.log = lambda *args, **kwargs: None
        module.log_dict = lambda *args, **kwargs: None
        loss = module.training_step(batch, 0)
        loss.backward()
        assert all(p.grad is not None for p in module.network.parameters())


def test_starts_from_exported_weights(room_cache: Path, tmp_path: Path) -> None:
    first = tiny_clift()
    file = tmp_path / "first.safetensors"
    save_file(export_clift(first.network), file)
    second = tiny_condensing(pretrained=file)
    tiny_trainer(tmp_path, 1, limit_val_batches=0).validate(
        second, rooms(room_cache), verbose=False
    )
    for name, value in first.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], value), name


@pytest.mark.parametrize("keep", [(0.0, 1.0), (0.5, 0.25), (0.5, 1.5)])
def test_refuses_shares_out_of_range(keep: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="keep="):
        tiny_clift(keep=keep)


def test_hyperparameters_load_without_code(room_cache: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, 1, limit_val_batches=0)
    module = tiny_condensing(pretrained=None)
    trainer.fit(module, rooms(room_cache))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = CliftCondensing.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert (again.shape, again.optimisation) == (SHAPE, OPTIMISATION)
    assert isinstance(Clift(SHAPE), Clift)


def test_table_pictures_and_files_of_a_test(room_cache: Path, tmp_path: Path) -> None:
    callbacks = [TokenBudgets((0.25,), (0.5,)), RenderedViews((0.25,)), CameraPathWriter()]
    trainer = tiny_trainer(tmp_path, 1, callbacks=callbacks)
    module = tiny_condensing()
    data = rooms(room_cache, predict_count=1, path_frames=3)
    trainer.test(module, data, verbose=False)
    content = json.loads((tmp_path / "rate_distortion/rate_distortion.json").read_text())
    rows = {(row["method"], row["rendered_tokens"]): row for row in content["rows"]}
    expected = {"random tokens", "K-means", "cluster mean", "K-means + condenser"}
    assert expected <= {method for method, _ in rows}
    assert rows["K-means + condenser", 16]["psnr"] == pytest.approx(rows["K-means", 16]["psnr"])
    assert rows["K-means", 16]["megabytes"] == pytest.approx(16 * 32 * 4 / 1e6)
    plane = rows["nearest view warped by a plane", None]["psnr"]
    assert plane > rows["nearest view copied", None]["psnr"] + 2
    values = json.loads((tmp_path / "rate_distortion/psnr_per_scene.json").read_text())
    assert {len(scenes) for scenes in values.values()} == {3}
    for name in ("views-test", "rate-distortion", "speed"):
        assert (tmp_path / f"pictures/{name}.png").stat().st_size > 1000
    trainer.predict(module, data, return_predictions=False)
    folder = tmp_path / "predictions/procedural-test-000000"
    assert len(list(folder.glob("frame-*.png"))) == 3
    scene = load_scene(folder / "scene.safetensors", network_identity(module.network))
    assert scene.tokens.shape == (16, 32)


def test_plane_depth_is_found_from_the_context_alone(room_cache: Path) -> None:
    context = dict(batch_of(room_cache)["context"])
    depth = best_plane_depth(context)  # type: ignore[arg-type]
    assert depth.shape == (2,)
    # Pictures of a textured plane: the first view, warped to the others' places at depth 2.
    one = {name: value[:, :1] for name, value in context.items()}
    two = torch.full((2,), 2.0)
    cameras = (context["pose"], context["intrinsics"])
    parts = (one["image"], one["pose"], one["intrinsics"], *cameras, two)
    context["image"] = warp_plane(*parts)
    found = best_plane_depth(context)  # type: ignore[arg-type]
    assert (found / two).log2().abs().max() < 0.5
