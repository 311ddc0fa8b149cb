"""Weights of Concerto: released, ours and plain files give the same encoder, and go round."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.concerto.checkpoint import load_backbone, load_pretraining, save_backbone
from models.concerto.clouds import grid_coordinates
from models.concerto.encoder import EncoderShape, PointTransformer, up_cast
from models.concerto.pretraining import Concerto, LossWeights, StepDraws, StepSettings
from tests.models.concerto_cases import (
    TINY,
    TINY_ENCODER,
    fill,
    random_cloud,
    random_views,
    read_case,
)
from tests.models.concerto_files import (
    COLOURED,
    PLAIN,
    PLAIN_ENCODER,
    encoder_of,
    lightning_checkpoint,
    released_config,
    training_checkpoint,
)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def features(encoder: PointTransformer) -> Tensor:
    cloud = random_cloud(2, 60)
    cloud = cloud._replace(grid_coord=grid_coordinates(cloud.coord, 0.06))
    with torch.no_grad():
        return up_cast(encoder.eval()(cloud), encoder.shape.levels - 1)


@pytest.fixture(scope="module")
def network() -> Concerto:
    built = Concerto(PLAIN)
    fill(built)
    return built


def test_released_backbone_is_read_with_its_configuration(tmp_path: Path) -> None:
    source, path = encoder_of(replace(TINY_ENCODER, drop_path=0.2)), tmp_path / "concerto_tiny.pth"
    config = released_config(source.shape)
    torch.save({"config": config, "state_dict": source.state_dict()}, path)
    loaded = load_backbone(path)
    assert loaded.encoder.shape == source.shape
    assert loaded.notes == ()
    assert not loaded.encoder.training
    assert_same(loaded.encoder, source)
    assert torch.equal(features(loaded.encoder), features(source))


def test_lacking_mask_token_is_zero_and_said_so(tmp_path: Path) -> None:
    source, path = encoder_of(), tmp_path / "concerto_tiny.pth"
    state = source.state_dict()
    del state["embedding.mask_token"]
    torch.save({"config": released_config() | {"mask_token": False}, "state_dict": state}, path)
    loaded = load_backbone(path)
    assert loaded.notes == ("no mask token in the file: it is zero, as before training",)
    assert loaded.encoder.embedding.mask_token.abs().max() == 0
    assert torch.equal(features(loaded.encoder), features(source))


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_student_of_a_training_checkpoint_is_read(
    prefix: str, network: Concerto, tmp_path: Path
) -> None:
    path = tmp_path / "model_last.pth"
    torch.save(training_checkpoint(network, prefix), path)
    loaded = load_backbone(path)
    assert loaded.encoder.shape == PLAIN_ENCODER
    assert_same(loaded.encoder, network.student.backbone)
    assert not torch.equal(
        loaded.encoder.embedding.mask_token, network.teacher.backbone.embedding.mask_token
    )
    assert any("heads=(1, 2, 2), patch_size=1024" in note for note in loaded.notes)
    assert any(f"beside {prefix}student.backbone left out" in note for note in loaded.notes)


def test_fine_tuned_models_give_their_encoder(tmp_path: Path) -> None:
    source, path = encoder_of(PLAIN_ENCODER), tmp_path / "model_best.pth"
    state = {f"module.backbone.{key}": value for key, value in source.state_dict().items()}
    state |= {"module.backbone.dec.dec0.up.proj.0.weight": torch.zeros(2, 2)}
    state |= {"module.seg_head.weight": torch.zeros(20, 64)}
    torch.save({"state_dict": state}, path)
    loaded = load_backbone(path)
    assert_same(loaded.encoder, source)
    assert "1 weights of a decoder left out" in loaded.notes


@pytest.mark.parametrize("shape", [TINY_ENCODER, COLOURED])
def test_our_checkpoints_give_back_the_student(shape: EncoderShape, tmp_path: Path) -> None:
    source = Concerto(replace(TINY, encoder=shape))
    fill(source)
    path = tmp_path / "last.ckpt"
    torch.save(lightning_checkpoint(source, asdict(source.shape)), path)
    loaded = load_backbone(path)
    assert loaded.encoder.shape == shape
    assert_same(loaded.encoder, source.student.backbone)
    probe = nn.ModuleDict({"backbone": source.student.backbone})
    torch.save(lightning_checkpoint(probe, asdict(shape)), path)
    assert load_backbone(path).encoder.shape == shape


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("shape", [TINY_ENCODER, COLOURED])
def test_saved_backbone_goes_round(suffix: str, shape: EncoderShape, tmp_path: Path) -> None:
    source, path = encoder_of(shape), tmp_path / f"backbone{suffix}"
    save_backbone(path, source)
    loaded = load_backbone(path)
    assert loaded.notes == ()
    assert loaded.encoder.shape == replace(shape, colour_centre=0.0, colour_scale=1.0)
    if shape is TINY_ENCODER:
        assert_same(loaded.encoder, source)
    torch.testing.assert_close(features(loaded.encoder), features(source), atol=1e-4, rtol=1e-4)
    beside = {".json"} if suffix == ".safetensors" else set()
    assert {file.suffix for file in tmp_path.iterdir()} == {suffix} | beside
    with pytest.raises(ValueError, match=r"must end in .pth or .safetensors"):
        save_backbone(tmp_path / "backbone.bin", source)


def test_exported_file_has_the_released_layout(tmp_path: Path) -> None:
    """Same keys, shapes and arguments, so the official class takes it by ** and strictly."""
    description = read_case("losses_full_step")[0]
    shape = EncoderShape.tiny()
    save_backbone(tmp_path / "tiny.pth", PointTransformer(replace(shape, patch_size=64)))
    content = torch.load(tmp_path / "tiny.pth", weights_only=True)
    assert content.keys() == {"config", "state_dict"}
    prefix = "student.backbone."
    stored = {k: v for k, v in description["state_dict"].items() if k.startswith(prefix)}
    ours = {f"{prefix}{key}": list(value.shape) for key, value in content["state_dict"].items()}
    assert ours == stored
    released = description["config"]["constructor"]["backbone"]
    released = {k: tuple(v) if isinstance(v, list) else v for k, v in released.items()}
    assert content["config"] | {"drop_path": 0.0} == {
        key: value for key, value in released.items() if key != "type"
    }
    assert all(value.dtype == torch.float32 for value in content["state_dict"].values())


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_training_goes_on_from_a_released_checkpoint(
    prefix: str, network: Concerto, tmp_path: Path
) -> None:
    path = tmp_path / "pretrain.pth"
    torch.save(training_checkpoint(network, prefix), path)
    loaded = load_pretraining(path, PLAIN.patch_grid)
    assert loaded.shape == PLAIN
    assert_same(loaded, network)
    views, settings = random_views(), StepSettings(0.4, 0.5, 0.05, 0.06)
    losses = []
    for each in (network, loaded):
        each.eval()
        draws = StepDraws(torch.Generator().manual_seed(0))
        losses.append(each(views, settings, draws).loss)
    assert torch.equal(*losses)
    losses[1].backward()
    assert loaded.student.backbone.embedding.mask_token.grad is not None
    assert not any(value.requires_grad for value in loaded.teacher.parameters())
    loaded.update_teacher(0.5)
    assert not torch.equal(
        loaded.teacher.mask_head.mlp[0].weight, network.teacher.mask_head.mlp[0].weight
    )
    sonata = load_pretraining(path, PLAIN.patch_grid, LossWeights(2 / 8, 2 / 8, 4 / 8, 0))
    assert not sonata.patch_proj.weight.requires_grad


def test_training_goes_on_from_ours_with_its_own_sizes(tmp_path: Path) -> None:
    shape = replace(TINY, encoder=COLOURED, match_radius=0.5, cross_level=1)
    source, path = Concerto(shape), tmp_path / "last.ckpt"
    torch.save(lightning_checkpoint(source, asdict(shape)), path)
    loaded = load_pretraining(path)
    assert loaded.shape == shape
    assert_same(loaded, source)


def test_levels_of_a_released_base_model_are_found(tmp_path: Path) -> None:
    """Full widths, one block a level to be quick."""
    encoder = EncoderShape(
        channels=(48, 96, 192, 384, 512), heads=(3, 6, 12, 24, 32), depths=(1, 1, 1, 1, 1)
    )
    with torch.device("meta"):
        large = Concerto(replace(PLAIN, encoder=encoder, cluster_level=2, cross_level=3))
    zeros = {f"module.{k}": torch.zeros(v.shape) for k, v in large.state_dict().items()}
    path = tmp_path / "base.pth"
    torch.save({"state_dict": zeros}, path)
    loaded = load_pretraining(path)
    assert loaded.shape == replace(large.shape, patch_grid=(37, 37))
    assert loaded.student.mask_head.mlp[0].weight.shape[1] == 1088
    assert loaded.patch_proj.weight.shape[1] == 1184


def test_image_encoder_of_a_checkpoint_is_not_touched(network: Concerto, tmp_path: Path) -> None:
    """Its NaN would be noticed if it were read."""
    content, path = training_checkpoint(network), tmp_path / "pretrain.pth"
    content["state_dict"]["module.enc2d_model.layer.0.weight"] = torch.full((3, 3), torch.nan)
    torch.save(content, path)
    assert_same(load_pretraining(path, PLAIN.patch_grid), network)
    load_backbone(path)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    source, path = encoder_of(), tmp_path / "half.pth"
    state = {key: value.half() for key, value in source.state_dict().items()}
    torch.save({"config": released_config(), "state_dict": state}, path)
    weight = load_backbone(path).encoder.embedding.stem.linear.weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, source.embedding.stem.linear.weight, atol=1e-3, rtol=1e-3)


def test_file_may_be_replaced_after_reading(tmp_path: Path) -> None:
    source, path = encoder_of(), tmp_path / "backbone.pth"
    save_backbone(path, source)
    loaded = load_backbone(path)
    path.write_bytes(b"")
    assert_same(loaded.encoder, source)


def test_interrupted_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, encoder_of())
    before = load_file(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("models.concerto.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_backbone(path, PointTransformer(TINY_ENCODER))
    after = load_file(path)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "backbone.json",
        "backbone.safetensors",
    ]
