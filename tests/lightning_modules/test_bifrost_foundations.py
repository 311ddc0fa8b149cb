"""The stages that make the demo's foundations: they learn, repeat, resume, measure and export."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode

from datamodules.errors import DataError
from datamodules.text_image import resident_pairs
from datamodules.text_image.resident_pairs import ResidentPairs
from datamodules.text_image.text_image import TextImagePairs
from lightning_modules.bifrost_caption_split import taught_captions
from lightning_modules.bifrost_flux import BifrostFlux
from lightning_modules.bifrost_foundation_options import FoundationOptimisation
from lightning_modules.bifrost_tower import BifrostTower
from lightning_modules.bifrost_tower_figures import (
    ChoiceOptions,
    SplitEncoding,
    choice_share,
    recall_figures,
)
from lightning_modules.bifrost_vae import BifrostVae
from lightning_modules.callbacks.foundation_export import FoundationExport
from lightning_modules.callbacks.foundation_pictures import FoundationPictures
from lightning_modules.cli.csv_logger import RunCSVLogger
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.resident_pictures import ResidentPictures
from models.bifrost.demo_foundation_files import (
    FLUX,
    LANGUAGE,
    TOWER,
    VAE,
    load_flux,
    load_foundations,
    read_record,
)
from models.bifrost.demo_foundations import FluxShape, VaeShape
from models.bifrost.demo_joint_training import caption_nats
from models.bifrost.demo_tokenizer import TokenBatch
from models.bifrost.demo_tower import (
    DemoLanguageShape,
    TowerShape,
    build_language_model,
    caption_logits,
)
from models.bifrost.flow_sampling import SamplingOptions
from models.bifrost.flux_latents import encode_images
from tests.datamodules.caption_roots import encoded
from tests.lightning_modules.clift_runs import tiny_trainer
from tests.quiet_trainings import SaveAt

FAST = FoundationOptimisation(lr=4e-3, warmup_steps=1)
SIZE = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures of one colour each with captions to train on, 10 to test on."""
    folder = tmp_path_factory.mktemp("pairs")
    for split, first, count in (("train", 0, 40), ("test", 40, 10)):
        numbers = range(first, first + count)
        images = [{"bytes": encoded(n), "path": f"{n}.png"} for n in numbers]
        captions = [f"thing number {n}" for n in numbers]
        pq.write_table(
            pa.table({"image": images, "caption": captions}), folder / f"{split}.parquet"
        )
    return folder


def pairs(root: Path, **changes: Any) -> ResidentPairs:  # noqa: ANN401
    options: dict[str, Any] = {"root": root, "image_size": SIZE, "batch_size": 8}
    return ResidentPairs(**{**options, **changes})


def tower(**changes: Any) -> BifrostTower:  # noqa: ANN401
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "shape": TowerShape(image_size=SIZE, width=24, layers=1, latent_width=32),
        "language": DemoLanguageShape(vocabulary=280, width=32, layers=1, mlp=48),
        "optimisation": FAST,
        "shift": 1,
        "choice": ChoiceOptions(captions=5, pictures=10),
        "image_size": SIZE,
    }
    return BifrostTower(**{**options, **changes})


def vae(**changes: Any) -> BifrostVae:  # noqa: ANN401
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "shape": VaeShape(channels=(8, 8), latent_channels=2),
        "optimisation": FAST,
        "shift": 1,
        "image_size": SIZE,
    }
    return BifrostVae(**{**options, **changes})


def flux(folder: Path, **changes: Any) -> BifrostFlux:  # noqa: ANN401
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "folder": folder,
        "shape": FluxShape(
            double_layers=1,
            single_layers=1,
            heads=2,
            head_channels=16,
            rotary_channels=(4, 6, 6),
        ),
        "optimisation": FAST,
        "sampling": SamplingOptions(steps=2),
        "figure_pictures": 6,
        "image_size": SIZE,
    }
    return BifrostFlux(**{**options, **changes})


def exporting(folder: Path, steps: int, **changes: Any) -> Trainer:  # noqa: ANN401
    """A trainer with the stages' callbacks and their table of figures."""
    return tiny_trainer(
        folder,
        steps,
        logger=RunCSVLogger(folder),
        callbacks=[FoundationExport(), FoundationPictures()],
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        **changes,
    )


@pytest.fixture(scope="module")
def shipped(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of all three stages, trained for a few steps, in one folder."""
    folder = tmp_path_factory.mktemp("foundations")
    for module in (tower(), vae()):
        exporting(folder, 12).fit(module, datamodule=pairs(root))
    exported = folder / "foundations"
    exporting(folder, 12).fit(flux(exported), datamodule=pairs(root))
    return exported


def test_parts_are_exported_with_recipe_and_figures(shipped: Path, root: Path) -> None:
    found = load_foundations(shipped)
    assert found.tower.shape.tokens == 4
    assert found.tokenizer.decode(found.tokenizer.encode(["thing number 7"]).ids) == [
        "thing number 7"
    ]
    for name in (TOWER, LANGUAGE, VAE, FLUX):
        record = read_record(shipped, name)
        assert record["recipe"]["steps"] == 12
        assert record["recipe"]["pairs"] == 40
        assert all(np.isfinite(value) for value in record["figures"].values())
    figures = read_record(shipped, TOWER)["figures"]
    assert {f"{split}_{key}" for split in ("train", "held_out") for key in ("r1", "choice")} <= set(
        figures
    )
    assert (
        read_record(shipped, FLUX)["recipe"]["vae_sha256"]
        == (read_record(shipped, VAE)["weights_sha256"])
    )
    images = torch.from_numpy(np.asarray(pairs(root).whole("train").pixels)).permute(0, 3, 1, 2)
    latents = encode_images(found.vae, images / 127.5 - 1)
    assert abs(latents.mean()) < 0.02
    assert latents.std() == pytest.approx(1, abs=0.02)
    with (shipped.parent / "metrics.csv").open() as table:
        columns = table.readline()
    assert "final/held_out_psnr" in columns
    assert "final/taught_pixel_r1_of_100" in columns
    names = {path.name for path in (shipped.parent / "pictures").iterdir()}
    assert names == {f"bifrost{kind}-step000012.png" for kind in ("tower", "vae", "flux")}


@pytest.mark.parametrize("kind", ["tower", "vae", "flux"])
def test_loss_falls_whatever_the_global_random_state(
    kind: str, root: Path, shipped: Path, tmp_path: Path
) -> None:
    losses = []
    for seed in (1, 2):
        module = build(kind, shipped)
        torch.manual_seed(seed)
        trainer = tiny_trainer(tmp_path, 30, limit_val_batches=0)
        seen = Losses(module)
        trainer.fit(module, datamodule=pairs(root))
        losses.append(seen.values)
    assert losses[0] == losses[1]
    assert np.mean(losses[0][-5:]) < 0.85 * np.mean(losses[0][:3])


class Losses:
    """Remembers what a module's training steps return."""

    def __init__(self, module: LightningModule) -> None:
        self.values: list[float] = []
        step = module.training_step

        def remember(batch: Any, batch_idx: int) -> torch.Tensor:  # noqa: ANN401
            loss = step(batch, batch_idx)
            self.values.append(float(loss.detach()))
            return loss

        module.training_step = remember


def build(kind: str, folder: Path) -> LightningModule:
    return {"tower": tower, "vae": vae}[kind]() if kind != "flux" else flux(folder)


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    found: list[str]

    def __enter__(self) -> HostReads:
        self.found = []
        return super().__enter__()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        name = str(func)
        masked = "index.Tensor" in name and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        if masked or any(word in name for word in ("_local_scalar_dense", "nonzero", "unique")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["tower", "vae", "flux"])
def test_a_step_never_waits_for_the_device(
    kind: str, root: Path, shipped: Path, tmp_path: Path
) -> None:
    module, data = build(kind, shipped), pairs(root)
    trainer = tiny_trainer(tmp_path, 2, limit_val_batches=0, log_every_n_steps=50)
    step = module.training_step
    modes = []

    def watched(batch: Any, batch_idx: int) -> torch.Tensor:  # noqa: ANN401
        with HostReads() as mode:
            loss = step(batch, batch_idx)
        modes.append(mode)
        return loss

    module.training_step = watched
    trainer.fit(module, datamodule=data)
    assert [mode.found for mode in modes] == [[], []]
    with HostReads() as mode:
        bool(torch.zeros(2)[torch.ones(2, dtype=torch.bool)].any())
    assert len(mode.found) >= 2


def test_resumed_run_repeats_the_steps(root: Path, tmp_path: Path) -> None:
    path, whole, again = tmp_path / "x.ckpt", tower(), tower()
    saving = tiny_trainer(tmp_path, 8, limit_val_batches=0, callbacks=[SaveAt(path, 3)])
    saving.fit(whole, datamodule=pairs(root))
    torch.manual_seed(5)
    trainer = tiny_trainer(tmp_path, 8, limit_val_batches=0)
    trainer.fit(again, datamodule=pairs(root), ckpt_path=path, weights_only=True)
    for mine, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_checkpoints_of_other_foundations_are_refused(
    root: Path, shipped: Path, tmp_path: Path
) -> None:
    module = flux(shipped)
    stored: dict[str, Any] = {}
    module.on_save_checkpoint(stored)
    module.on_load_checkpoint(stored)
    stored["foundation_identities"][VAE] = "0" * 64
    with pytest.raises(CheckpointError, match=r"vae .*: the checkpoint learnt from 000000000000"):
        module.on_load_checkpoint(stored)
    first = tower()
    tiny_trainer(tmp_path, 1, limit_val_batches=0).fit(first, datamodule=pairs(root))
    with pytest.raises(CheckpointError, match="tokenizer: the checkpoint's was learnt from other"):
        first.on_load_checkpoint({"tokenizer": "{}"})


def test_frozen_networks_stay_as_they_are(root: Path, shipped: Path, tmp_path: Path) -> None:
    module = flux(shipped)
    before = {k: v.clone() for k, v in module.ground.language_model.state_dict().items()}
    tiny_trainer(tmp_path, 3, limit_val_batches=0).fit(module, datamodule=pairs(root))
    after = module.ground.language_model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(key.startswith("ground") for key in module.state_dict())
    assert module.shape.in_channels == 8
    assert module.shape.text_width == 32


def test_flux_reads_taught_captions_only(root: Path, shipped: Path, tmp_path: Path) -> None:
    captions = pairs(root).whole("train").captions
    taught = taught_captions(captions, 0.5)
    assert 10 < int(taught.sum()) < 30
    assert torch.equal(taught_captions(captions[::-1], 0.5).flip(0), taught)
    assert not (taught & ~taught_captions(captions, 0.7)).any()
    assert not taught_captions(captions, 0.0).any()
    assert taught_captions(captions, 1.0).all()
    module = flux(shipped, caption_dropout=0.0)
    trainer = tiny_trainer(tmp_path, 1, limit_val_batches=0, log_every_n_steps=50)
    trainer.fit(module, datamodule=pairs(root))
    withheld = int((~taught).nonzero()[0])
    index = torch.tensor([withheld] * 4)
    loss = module.training_step({"index": index}, 0)
    module._train.text.states[withheld] += 5
    assert torch.equal(module.training_step({"index": index}, 0), loss)
    known = int(taught.nonzero()[0])
    index = torch.tensor([known] * 4)
    loss = module.training_step({"index": index}, 0)
    module._train.text.states[known] += 5
    assert not torch.equal(module.training_step({"index": index}, 0), loss)


def test_pictures_move_and_keep_their_border() -> None:
    pixels = torch.arange(2 * 6 * 6 * 3).view(2, 6, 6, 3).to(torch.uint8)
    pictures = ResidentPictures(pixels, torch.device("cpu"))
    index = torch.tensor([1, 0, 1, 1])
    plain = pictures.take(index)
    torch.testing.assert_close(plain, pixels[index].permute(0, 3, 1, 2) / 127.5 - 1)
    seed = torch.Generator()
    moved = pictures.take_shifted(index, 2, seed.manual_seed(3))
    assert torch.equal(moved, pictures.take_shifted(index, 2, seed.manual_seed(3)))
    assert not torch.equal(moved, pictures.take_shifted(index, 2, seed.manual_seed(4)))
    assert torch.equal(pictures.take_shifted(index, 0, seed), plain)
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2), mode="replicate")
    for mine, wide in zip(moved, padded, strict=True):
        crops = [wide[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
        assert any(torch.equal(mine, crop) for crop in crops)


def test_figures_are_counted_rightly() -> None:
    eye = torch.eye(4)
    numbers = torch.arange(4.0)
    encoding = SplitEncoding(eye, eye[[0, 1, 3, 2]], numbers, numbers, torch.tensor([1.0, 1, 1, 5]))
    assert recall_figures(encoding) == {"r1": 0.5, "r1_of_100": 0.5}
    assert encoding.means() == {"psnr": 1.5, "caption_nats": pytest.approx((0 + 1 + 2 + 15) / 8)}
    joined = SplitEncoding.join([encoding, encoding])
    assert joined.psnr.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"captions=1: must be 2 \.\. pictures=160"):
        ChoiceOptions(captions=1)


def test_the_likeliest_caption_is_chosen() -> None:
    torch.manual_seed(0)
    model = build_language_model(DemoLanguageShape(vocabulary=12, width=16, layers=1, mlp=16))
    ids = torch.tensor([[1, 3, 4], [1, 5, 6], [1, 7, 8], [1, 9, 10]])
    tokens = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))
    latents = torch.nn.Parameter(torch.randn(4, 2, 16))
    optimiser = torch.optim.Adam([latents, *model.parameters()], lr=1e-2)
    for _ in range(120):
        logits = caption_logits(model, latents, ids, tokens.mask)
        optimiser.zero_grad()
        caption_nats(logits, ids, tokens.mask).mean().backward()
        optimiser.step()
    assert choice_share(model, latents, tokens, 2) == 1
    assert choice_share(model, latents, tokens, 4) == 1
    assert choice_share(model, latents.flip(0), tokens, 4) == 0
    assert np.isnan(choice_share(model, latents[:1], tokens, 2))


def test_positions_and_whole_splits_agree_with_plain_pairs(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, plain = pairs(root), TextImagePairs(root=root, image_size=SIZE, batch_size=8)
    (first, *rest) = list(data.train_dataloader())
    assert set(first) == {"index"}
    assert len(rest) == 4
    expected = next(iter(plain.train_dataloader()))
    assert torch.equal(first["index"], expected["index"])
    pixels, captions = data.whole("train")
    pictures = ResidentPictures(pixels, torch.device("cpu"))
    torch.testing.assert_close(pictures.take(first["index"]), expected["image"])
    assert [captions[i] for i in first["index"]] == expected["caption_full"]
    monkeypatch.setattr(resident_pairs, "_MOST_BYTES", 1000)
    with pytest.raises(DataError, match="split train: 40 images of 16 x 16 are too many"):
        data.whole("train")


def test_embedded_emoji_need_no_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "datasets"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    whole = ResidentPairs().whole("test")
    assert whole.pixels.shape == (186, 64, 64, 3)
    assert len(set(whole.captions)) > 150


def test_wrong_arguments_and_data_are_named(root: Path, shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"latent_width=32: must be language.width=64"):
        tower(language=DemoLanguageShape(vocabulary=280, width=64))
    with pytest.raises(ValueError, match="shift=-1: must be >= 0"):
        vae(shift=-1)
    with pytest.raises(ValueError, match=r"caption_share=1.5: must be 0 \.\. 1"):
        flux(shipped, caption_share=1.5)
    with pytest.raises(FileNotFoundError, match="there is no such file; train it with"):
        flux(tmp_path)
    with pytest.raises(TypeError, match=r"foundations need .*ResidentPairs"):
        tiny_trainer(tmp_path, 1).fit(
            tower(), datamodule=TextImagePairs(root=root, image_size=SIZE, batch_size=8)
        )
    plain = LightningModule()
    for callback in (FoundationExport(), FoundationPictures()):
        with pytest.raises(TypeError, match="LightningModule"):
            callback.setup(tiny_trainer(tmp_path, 1), plain, "fit")


def test_a_run_without_validation_draws_at_its_end(root: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, 2, limit_val_batches=0, callbacks=[FoundationPictures()])
    trainer.fit(vae(), datamodule=pairs(root))
    names = [path.name for path in (tmp_path / "pictures").iterdir()]
    assert names == ["bifrostvae-step000002.png"]
    dry = tiny_trainer(tmp_path / "dry", fast_dev_run=True, callbacks=[FoundationPictures()])
    dry.fit(vae(), datamodule=pairs(root))
    assert not (tmp_path / "dry").exists()


def test_record_is_plain_json_of_numbers_and_text(shipped: Path) -> None:
    record = json.loads((shipped / f"{FLUX}.json").read_text())
    assert all(isinstance(value, str | int | float) for value in record["recipe"].values())
    assert load_flux(shipped).config["in_channels"] == 8
