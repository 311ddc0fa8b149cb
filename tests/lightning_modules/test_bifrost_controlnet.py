"""Stage B of Bifrost-1: what it trains, logs, draws, keeps and refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from lightning_modules.bifrost_controlnet import BifrostControlNet
from lightning_modules.bifrost_frozen import DemoFoundation
from lightning_modules.bifrost_generation import read_branch
from lightning_modules.bifrost_options import BifrostOptimisation, ControlNetShape
from lightning_modules.bifrost_painter import DemoPainter, FluxPainter
from lightning_modules.callbacks.latent_store import LatentStore
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.randomness import NOISE, device_generator
from models.bifrost.controlnet_checkpoint import export_controlnet
from models.bifrost.demo_foundations import FluxShape, build_flux
from models.bifrost.flow import Condition, SigmaDraw, draw_sigmas, flow_loss
from models.bifrost.flow_sampling import SamplingOptions
from models.bifrost.language_model import weights_digest
from tests.lightning_modules.bifrost_runs import (
    OPTIMISATION,
    folder,
    pairs,
    root,
    saved,
    seeded,
    tiny_branch,
    tiny_controlnet,
    tiny_trainer,
    write_foundations,
)
from tests.lightning_modules.test_bifrost_branch import Gradients
from tests.models.test_bifrost_prompts import tokenizer

__all__ = ["folder", "root"]


def frozen_digests(module: BifrostControlNet) -> list[str]:
    painter, foundation = module.painter, module.foundation
    networks = (painter.flux, painter.vae, *painter._text_networks())
    held = (foundation.language_model.model, foundation.tower.network)
    return [weights_digest(network) for network in (*networks, *held)]


@pytest.mark.parametrize(
    ("precision", "lean"), [("32-true", False), ("32-true", True), ("bf16-mixed", True)]
)
def test_trains_and_validates_through_frozen_parts(
    precision: Any,  # noqa: ANN401
    lean: bool,
    folder: Path,
    root: Path,
    tmp_path: Path,
) -> None:
    shape = ControlNetShape(1, 1, lean_attention=lean)
    module, gradients = tiny_controlnet(folder, shape=shape), Gradients()
    before = frozen_digests(module)
    start = {name: value.clone() for name, value in module.named_parameters()}
    options = {"precision": precision, "val_check_interval": 3, "callbacks": [gradients]}
    trainer = tiny_trainer(tmp_path, 3, **options)
    trainer.fit(module, pairs(root))
    # A bias before a batch norm is subtracted again: its gradient is rounding alone.
    assert gradients.reached == set(start), "gradient within three steps"
    assert frozen_digests(module) == before
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, start[name])}
    assert moved == set(start)
    metrics = trainer.callback_metrics
    assert {"train/loss", "val/loss", "val/loss_text_alone"} <= set(metrics)
    assert all(bool(value.isfinite()) for value in metrics.values())


def test_a_fresh_controlnet_changes_nothing(folder: Path, root: Path, tmp_path: Path) -> None:
    module, data = tiny_controlnet(folder), pairs(root)
    trainer = tiny_trainer(tmp_path, 1)
    [metrics] = trainer.validate(module, data, verbose=False)
    assert metrics["val/loss"] == metrics["val/loss_text_alone"]
    latents = module.foundation.latents(data.gallery("train", 2)["image"])
    args = (["red bar", "dot"], [(0,), (1,)])
    controlled = module.drawing.paint(args[0], latents, args[1])
    assert torch.equal(controlled, module.drawing.paint(args[0], None, args[1]))


def test_first_losses_are_those_of_the_keyed_noise(
    folder: Path, root: Path, tmp_path: Path
) -> None:
    class Kept(BifrostControlNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
            seen.append((batch, super().training_step(batch, batch_idx)))
            return seen[-1][1]

    seen: list[tuple[Any, Tensor]] = []
    draw = SigmaDraw("logit_normal", 0.3)
    rates = BifrostOptimisation(lr=1e-9, warmup_steps=1)
    with seeded(1):
        module = Kept(
            DemoFoundation(folder), DemoPainter(folder), ControlNetShape(1, 1), draw,
            optimisation=rates, image_size=16,
        )  # fmt: skip
    data = pairs(root, caption_dropout=0.5)
    tiny_trainer(tmp_path, 2, limit_val_batches=0).fit(module, data)
    for step, (batch, loss) in enumerate(seen):
        assert "" in batch["caption"]
        generator = device_generator(torch.device("cpu"), 0, NOISE, 0, step, 0)
        sigmas = draw_sigmas(8, draw, generator)
        clean = module.painter.encode(batch["image"])
        noise = torch.empty_like(clean).normal_(generator=generator)
        text = module.painter.text(batch["caption"])
        condition = Condition(text, module.foundation.latents(batch["image"]))
        given = (module.painter.flux, module.controlnet, clean, noise, sigmas, condition)
        with torch.no_grad():
            expected = flow_loss(*given, module.grid).mean()
        assert_close(loss, expected, atol=1e-5, rtol=1e-4)


def test_stored_rows_train_as_those_in_memory(folder: Path, root: Path, tmp_path: Path) -> None:
    trained = []
    for kept in (True, False):
        module = tiny_controlnet(folder, memory_mb=64 if kept else 0)
        store = LatentStore(tmp_path / "store", dtype="float32")
        options = {"callbacks": [] if kept else [store], "limit_val_batches": 0}
        tiny_trainer(tmp_path, 4, **options).fit(module, pairs(root, caption_dropout=0.3))
        trained.append(module.controlnet.state_dict())
    assert len(list((tmp_path / "store").glob("*/train/*.safetensors"))) == 3
    for name, value in trained[0].items():
        assert_close(trained[1][name], value, atol=1e-5, rtol=1e-3, msg=name)


def test_averaged_weights_and_batch_norms(folder: Path, root: Path, tmp_path: Path) -> None:
    """Averages take the buffers along, and share what is frozen instead of copying it."""
    module = tiny_controlnet(folder)
    average = EMAWeightAveraging(decay=0.5, update_starting_at_step=0)
    trainer = tiny_trainer(tmp_path, 4, callbacks=[average], val_check_interval=3)
    trainer.fit(module, pairs(root))
    averaged: Any = average._average_model
    # At the end of training the averages have become the module's own.
    for name, value in averaged.module.controlnet.state_dict().items():
        assert torch.equal(module.controlnet.state_dict()[name], value), name
    assert averaged.module.painter is module.painter
    assert averaged.module.foundation is module.foundation
    norm = module.controlnet.up_sampling_block.bn1
    assert norm.running_mean.any()
    assert not torch.equal(norm.running_var, torch.ones_like(norm.running_var))


def test_drawing_leaves_batch_norms_alone(folder: Path, root: Path, tmp_path: Path) -> None:
    module, data = tiny_controlnet(folder), pairs(root)
    saved(module, root, tmp_path / "two.ckpt")
    before = {name: value.clone() for name, value in module.controlnet.state_dict().items()}
    module.train()
    latents = module.foundation.latents(data.gallery("train", 3)["image"])
    together = module.drawing.paint(["red bar", "dot", ""], latents, [(5,), (6,), (7,)])
    alone = module.drawing.paint(["dot"], latents[1:2], [(6,)])
    assert together.shape == (3, 3, 16, 16)
    assert_close(alone[0], together[1], atol=1e-4, rtol=1e-4)
    assert not torch.equal(together[0], together[1])
    module.drawing.chunk = 2
    assert_close(
        module.drawing.paint(["red bar", "dot", ""], latents, [(5,), (6,), (7,)]),
        together, atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    for name, value in module.controlnet.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_guidance_leads_away_from_the_empty_caption(folder: Path) -> None:
    drawn = []
    for weight in (1.0, 3.0):
        sampling = SamplingOptions(steps=2, true_guidance=weight)
        module = tiny_controlnet(folder, sampling=sampling)
        drawn.append(module.drawing.paint(["red bar", ""], None, [(0,), (1,)]))
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert_close(drawn[0][1], drawn[1][1], atol=1e-4, rtol=1e-4)


def test_checkpoint_holds_the_controlnet_alone(folder: Path, root: Path, tmp_path: Path) -> None:
    module = tiny_controlnet(folder)
    path = saved(module, root, tmp_path / "two.ckpt")
    content = torch.load(path, weights_only=True)
    assert content["frozen_identities"] == module.identities
    assert all(name.startswith("controlnet.") for name in content["state_dict"])
    assert len(content["state_dict"]) == len(module.controlnet.state_dict())
    other = write_foundations(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match="was trained beside"):
        tiny_trainer(tmp_path, 4).fit(tiny_controlnet(other), pairs(root), ckpt_path=path)


def test_controlnet_from_the_released_layout(folder: Path, root: Path, tmp_path: Path) -> None:
    first = tiny_controlnet(folder)
    saved(first, root, tmp_path / "two.ckpt")
    export_controlnet(first.controlnet, tmp_path / "flux_controlnet")
    options = {"limit_train_batches": 0, "limit_val_batches": 0}
    second = tiny_controlnet(folder, pretrained=tmp_path / "flux_controlnet")
    tiny_trainer(tmp_path, 1, **options).fit(second, pairs(root))
    for name, value in first.controlnet.state_dict().items():
        assert torch.equal(second.controlnet.state_dict()[name], value), name
    absent = tiny_controlnet(folder, pretrained=tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"model\.pretrained"):
        tiny_trainer(tmp_path, 1, **options).fit(absent, pairs(root))


def test_branch_is_read_and_its_pictures_drawn(folder: Path, root: Path, tmp_path: Path) -> None:
    branch = tiny_branch(folder)
    path = saved(branch, root, tmp_path / "branch.ckpt")
    module = tiny_controlnet(folder, branch=path, pictures_per_prompt=2, chunk=3)
    data = pairs(root, predict_count=5, eval_batch_size=5)
    [predicted] = tiny_trainer(tmp_path).predict(module, data)
    assert predicted["image"].shape == (5, 2, 3, 16, 16)
    assert not torch.equal(predicted["image"][:, 0], predicted["image"][:, 1])
    generator = module.branch_generator()
    keys = [(2, 1)]
    latents = generator.generate(predicted["caption"][2:3], keys, module.decoding)
    alone = module.drawing.paint(predicted["caption"][2:3], latents, keys)
    assert_close(alone[0], predicted["image"][2, 1], atol=1e-4, rtol=1e-4)


def test_pictures_from_captions_need_a_branch(folder: Path, root: Path, tmp_path: Path) -> None:
    module = tiny_controlnet(folder)
    with pytest.raises(CheckpointError, match=r"^branch=None: .*model\.branch"):
        tiny_trainer(tmp_path).predict(module, pairs(root))
    path = saved(tiny_controlnet(folder), root, tmp_path / "two.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint of BifrostBranch"):
        read_branch(path, module.foundation)
    with pytest.raises(CheckpointError, match="absent"):
        read_branch(tmp_path / "absent.ckpt", module.foundation)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"image_size": 64}, "image_size: makes FLUX's grid 16 x 16, the latents' is 2 x 2"),
        ({"chunk": 0}, "chunk=0"),
        ({"pictures_per_prompt": 0}, "pictures_per_prompt=0"),
        ({"shape": ControlNetShape(3, 1)}, "num_layers=3"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], named: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        tiny_controlnet(folder, **options)


def write_flux(folder: Path) -> Path:
    """A tiny FLUX with text encoders in diffusers' layout."""
    chat = tokenizer()
    chat.model_max_length = 12
    sizes: dict[str, Any] = {"vocab_size": len(chat), "eos_token_id": 1, "pad_token_id": 0}
    clip = CLIPTextConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=2, **sizes,
    )  # fmt: skip
    t5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **sizes)
    shape = FluxShape(8, 1, 1, 2, 16, 16, (4, 6, 6), guidance=True)
    flux = build_flux(shape)
    config = {**flux.config, "pooled_projection_dim": 12}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=8, latent_channels=2,
        shift_factor=0.1, scaling_factor=0.5,
    )  # fmt: skip
    FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, CLIPTextModel(clip), chat, T5EncoderModel(t5), chat,
        type(flux).from_config(config),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_flux_folder(folder: Path, root: Path, tmp_path: Path) -> None:
    with seeded(0):
        write_flux(tmp_path / "flux")
    painter = FluxPainter(tmp_path / "flux", text_length=20, dtype="float32")
    text = painter.text(["red bar", ""])
    assert text.states.shape == (2, 20, 16)
    assert text.pooled.shape == (2, 12)
    assert set(painter.identities) == {"flux", "vae", "flux_text"}
    shape = ControlNetShape(1, 1, checkpointing=True)
    module = tiny_controlnet(folder, painter, shape=shape, optimisation=OPTIMISATION)
    trainer = tiny_trainer(tmp_path, 2, val_check_interval=2)
    trainer.fit(module, pairs(root))
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    assert not any(parameter.requires_grad for parameter in painter.flux.parameters())
    with pytest.raises(FileNotFoundError, match="no such folder; download"):
        FluxPainter(tmp_path / "absent")
