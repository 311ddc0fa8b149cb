"""Segmentation of clouds: what is trained and what is not, exact caches, votes, files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from datamodules.cloud_files import read_cloud
from datamodules.paired_2d3d.labelled_batch import LabelledBatch
from lightning_modules.backbone_files import read_backbone
from lightning_modules.callbacks.run_checkpoint import RunCheckpoint
from lightning_modules.callbacks.segmentation_clouds import SegmentationClouds
from lightning_modules.callbacks.segmentation_table import SegmentationTable
from lightning_modules.callbacks.step_seed import StepSeed
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.metrics.segmentation_scores import segmentation_scores
from lightning_modules.point_segmentation import PointSegmentation
from lightning_modules.segmentation_results import read_result
from lightning_modules.segmented_clouds import point_classes
from models.concerto.checkpoint import save_backbone
from models.concerto.clouds import PointCloud
from models.concerto.encoder import EncoderShape, PointTransformer
from models.concerto.segmenter import single_clouds
from tests.lightning_modules.segmentation_runs import (
    CLASSES,
    SHAPE,
    tiny_scenes,
    tiny_segmentation,
    tiny_trainer,
    write_tree,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"))


def seeded(**changes: Any) -> PointSegmentation:  # noqa: ANN401
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_segmentation(**changes)


def clouds(batch: LabelledBatch) -> list[PointCloud]:
    feat = torch.cat([batch["coord"], batch["colour"], batch["normal"]], 1)
    joint = PointCloud(batch["coord"], feat, batch["offset"], batch["grid_coord"])
    return list(single_clouds(joint))


def weights(module: PointSegmentation) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("mode", ["linear", "decoder", "full"])
def test_trains_what_the_mode_says(mode: str, root: Path, tmp_path: Path) -> None:
    module = seeded(mode=mode)
    before = weights(module)
    trainer = tiny_trainer(tmp_path, 4)
    trainer.fit(module, tiny_scenes(root))
    for name, value in module.state_dict().items():
        is_frozen = "backbone" in name and mode != "full"
        # Nothing is masked here, so the mask token has no use.
        assert torch.equal(value, before[name]) == (is_frozen or "mask_token" in name), name
    groups = trainer.optimizers[0].param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    frozen = {id(p) for p in module.network.backbone.parameters()}
    assert bool(trained & frozen) == (mode == "full")
    metrics = trainer.callback_metrics
    assert {"train/loss", "train/cross_entropy", "train/lovasz"} <= set(metrics)
    assert {"val/miou", "val/macc", "val/allacc"} <= set(metrics)
    assert_close(metrics["train/loss"], metrics["train/cross_entropy"] + metrics["train/lovasz"])


def test_learns_the_scenes(root: Path, tmp_path: Path) -> None:
    module = seeded(standardise=True, shuffle_orders=False, drop_path=False, cache_features=True,
                    optimisation={"lr": 0.05})  # fmt: skip
    trainer = tiny_trainer(tmp_path, 36, check_val_every_n_epoch=12)
    trainer.fit(module, tiny_scenes(root, augment=False))
    assert trainer.callback_metrics["val/miou"] > 0.9


def test_blocks_have_a_rate_of_their_own_in_full_fine_tuning() -> None:
    module = seeded(mode="full")
    names = {id(p): name for name, p in module.named_parameters()}
    others, blocks = module._groups()
    assert_close(blocks["lr"], others["lr"] * 0.1)
    block_names = {names[id(p)] for p in blocks["params"]}
    assert any("backbone" in name for name in block_names)
    assert any("decoder" in name for name in block_names)
    assert all(".block" in name for name in block_names)
    assert "network.backbone.embedding.stem.linear.weight" in {
        names[id(p)] for p in others["params"]
    }
    assert len(seeded(mode="linear")._groups()) == 1


def test_features_are_all_levels_of_the_finest_voxels(root: Path) -> None:
    module = seeded()
    batch = next(iter(tiny_scenes(root, augment=False, batch_size=1).train_dataloader()))
    assert module.network.head.in_features == sum(SHAPE.channels)
    assert module(batch).shape == (len(batch["coord"]), len(CLASSES))


@pytest.mark.parametrize("standardise", [False, True])
def test_cached_features_change_nothing(standardise: bool, root: Path, tmp_path: Path) -> None:
    options = {"shuffle_orders": False, "drop_path": False, "standardise": standardise}
    ends = []
    for cached in (False, True):
        module = seeded(cache_features=cached, **options)
        calls = []
        module.network.backbone.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        tiny_trainer(tmp_path, 9, limit_val_batches=0).fit(module, tiny_scenes(root, augment=False))
        ends.append((weights(module), len(calls)))
    (plain, plain_calls), (kept, kept_calls) = ends
    for name, value in plain.items():
        assert torch.equal(value, kept[name]), name
    assert kept_calls == 6, "every training cloud once"
    assert plain_calls == 18 + 6 * standardise


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "full", "drop_path": False, "shuffle_orders": False},
        {"drop_path": True, "shuffle_orders": False},
        {"drop_path": False, "shuffle_orders": True},
    ],
)
def test_cache_is_refused_where_features_change(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^cache_features=true"):
        seeded(cache_features=True, **options)


def test_cache_is_refused_where_clouds_change(root: Path, tmp_path: Path) -> None:
    module = seeded(cache_features=True, drop_path=False, shuffle_orders=False)
    with pytest.raises(ValueError, match=r"set data\.init_args\.augment to false"):
        tiny_trainer(tmp_path, 2).fit(module, tiny_scenes(root))


def test_standardiser_sees_every_training_cloud_once(root: Path, tmp_path: Path) -> None:
    data = tiny_scenes(root)
    module = seeded(standardise=True)
    tiny_trainer(tmp_path, 1, limit_val_batches=0).fit(module, data)
    module.eval()
    standardiser = module.network.standardiser
    assert standardiser is not None
    with torch.no_grad():
        seen = [module.network.features(c) for b in data.train_eval_dataloader() for c in clouds(b)]
    features = torch.cat(seen)
    assert int(standardiser.count) == len(features)
    assert_close(features.mean(0), torch.zeros(features.shape[1]), atol=1e-4, rtol=0)
    assert_close(features.std(0, correction=0), torch.ones(features.shape[1]), atol=1e-3, rtol=0)


def test_evaluation_of_a_cloud_does_not_depend_on_its_companions(root: Path) -> None:
    module = seeded().eval()
    with torch.no_grad():
        together = [module(b) for b in tiny_scenes(root, eval_batch_size=3).test_dataloader()]
        alone = [module(b) for b in tiny_scenes(root).test_dataloader()]
    assert len(together) == 1
    assert len(alone) == 3
    assert torch.equal(together[0], torch.cat(alone))


def test_order_of_curves_and_drop_path_act_only_where_asked(root: Path) -> None:
    batch = next(iter(tiny_scenes(root).train_dataloader()))

    def passes(**options: Any) -> bool:  # noqa: ANN401
        module = seeded(**options).train()
        torch.manual_seed(1)
        first = module(batch)
        return torch.equal(first, module(batch))

    assert not passes(drop_path=True, shuffle_orders=False)
    assert passes(drop_path=False, shuffle_orders=False)
    module = seeded(drop_path=False).train()
    orders = torch.tensor([[3, 2, 1, 0]] * 2)
    assert not torch.equal(module(batch, orders), module(batch))


@pytest.mark.parametrize("mode", ["linear", "decoder"])
def test_resumes_exactly(mode: str, root: Path, tmp_path: Path) -> None:
    def fit(folder: Path, ckpt_path: Path | None = None) -> PointSegmentation:
        saving = RunCheckpoint(every_n_train_steps=2, keep=9)
        options: dict[str, Any] = {"limit_val_batches": 0, "callbacks": [StepSeed(), saving]}
        module = seeded(mode=mode)
        trainer = tiny_trainer(folder, 5, enable_checkpointing=True, **options)
        trainer.fit(module, tiny_scenes(root), ckpt_path=ckpt_path)
        return module

    whole = fit(tmp_path / "whole")
    two = tmp_path / "whole" / "checkpoints" / "step-00000002.ckpt"
    resumed = fit(tmp_path / "resumed", two)
    early = torch.load(two, weights_only=True)["state_dict"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.equal(whole.state_dict()["network.head.weight"], early["network.head.weight"])


def test_votes_are_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(7, 3, generator=generator)
    sizes, votes = (4, 2), 2
    inverse = torch.randint(0, 7, (votes * sum(sizes),), generator=generator)
    batch: Any = {
        "inverse": inverse,
        "original_offset": torch.tensor(sizes).cumsum(0),
        "votes": votes,
    }
    found = point_classes(probabilities, batch)
    start, expected = 0, []
    for size in sizes:
        for point in range(size):
            rows = [inverse[start + copy * size + point] for copy in range(votes)]
            expected.append(int(sum(probabilities[row] for row in rows).argmax()))  # type: ignore[union-attr]
        start += votes * size
    assert found.tolist() == expected


def test_scores_of_a_confusion_matrix() -> None:
    confusion = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 4, 0, 0]])
    scores = segmentation_scores(confusion)
    assert_close(scores.iou[:2], torch.tensor([6 / 9, 3 / 10], dtype=torch.float64))
    assert scores.iou[2].isnan()
    assert scores.iou[3] == 0
    assert_close(float(scores.miou), (6 / 9 + 3 / 10 + 0) / 3)
    assert_close(float(scores.macc), (6 / 8 + 3 / 4 + 0) / 3)
    assert_close(float(scores.allacc), 9 / 16)
    assert scores.points.tolist() == [8, 4, 0, 4]


def test_scores_are_those_of_the_points_of_the_files(root: Path, tmp_path: Path) -> None:
    module = seeded()
    data = tiny_scenes(root, grid_size=0.3)
    trainer = tiny_trainer(tmp_path)
    trainer.test(module, data, verbose=False)
    module.eval()
    right, total = 0, 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            predicted = module.predict_points(batch)
            counted = batch["original_segment"] >= 0
            right += int((predicted == batch["original_segment"])[counted].sum())
            total += int(counted.sum())
            assert len(predicted) > 2 * len(batch["coord"])
    assert_close(float(trainer.callback_metrics["test/allacc"]), right / total, atol=1e-6, rtol=0)


def test_writes_table_and_clouds(root: Path, tmp_path: Path, capsys: Any) -> None:  # noqa: ANN401
    module = seeded(label="random", seed=4)
    callbacks = [SegmentationTable(), SegmentationClouds(clouds=2)]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks)
    trainer.test(module, tiny_scenes(root), verbose=False)
    printed = capsys.readouterr().out
    assert all(name in printed for name in CLASSES)
    result = read_result(tmp_path)
    assert (result.label, result.seed, result.split, result.clouds) == ("random", 4, "test", 3)
    assert result.class_names == CLASSES
    assert_close(result.miou, float(trainer.callback_metrics["test/miou"]), atol=1e-6, rtol=0)
    assert "random: linear" in (tmp_path / "segmentation.txt").read_text()
    names = sorted(path.name for path in (tmp_path / "clouds" / "test").iterdir())
    assert names == [f"scene{n}-{what}.ply" for n in (0, 1) for what in ("prediction", "truth")]
    truth = read_cloud(tmp_path / "clouds" / "test" / "scene0-truth.ply")
    labels = np.load(root / "test" / "scene0" / "segment.npy")
    assert truth.colour is not None
    assert len(np.unique(truth.colour[labels == 1], axis=0)) == 1
    assert np.array_equal(truth.coord, np.load(root / "test" / "scene0" / "coord.npy"))
    assert (tmp_path / "pictures" / "segmentation-test.png").is_file()
    trainer.test(module, tiny_scenes(root, test_split="val"), verbose=False)
    assert read_result(tmp_path, "val").clouds == 2
    assert read_result(tmp_path) == result


def test_a_trained_checkpoint_needs_no_pretrained_file(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    encoder = PointTransformer(EncoderShape(channels=(16, 32), heads=(1, 2), depths=(1, 1)))
    file = tmp_path / "backbone.pth"
    save_backbone(file, encoder)
    module = tiny_segmentation(pretrained=file, shape=None)
    key = "enc.enc1.block0.attn.qkv.weight"
    assert torch.equal(module.network.backbone.state_dict()[key], encoder.state_dict()[key])
    trainer = tiny_trainer(tmp_path, 2)
    trainer.fit(module, tiny_scenes(root))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trained = dict(trainer.validate(module, tiny_scenes(root), verbose=False)[0])
    file.unlink()
    again = tiny_segmentation(pretrained=file, shape=encoder.shape)
    with pytest.raises(FileNotFoundError, match=r"model\.init_args\.pretrained"):
        tiny_trainer(tmp_path, 1).fit(again, tiny_scenes(root))
    again = tiny_segmentation(pretrained=file, shape=encoder.shape)
    found = tiny_trainer(tmp_path).validate(
        again, tiny_scenes(root), ckpt_path=tmp_path / "run.ckpt", verbose=False
    )
    assert dict(found[0]) == trained
    assert torch.equal(
        read_backbone(tmp_path / "run.ckpt").state_dict()[key], encoder.state_dict()[key]
    )


def test_wrong_backbones_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape=null"):
        tiny_segmentation(shape=None)
    with pytest.raises(FileNotFoundError, match="no such file or run directory"):
        tiny_segmentation(shape=None, pretrained=tmp_path / "gone.pth")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"bad\.pth.*model\.init_args\.pretrained") as caught:
        tiny_segmentation(shape=None, pretrained=tmp_path / "bad.pth")
    assert "\n" not in str(caught.value)
    save_backbone(tmp_path / "other.pth", PointTransformer(SHAPE))
    with pytest.raises(ValueError, match=r"channels \(16, 32\)"):
        tiny_segmentation(
            shape=EncoderShape(channels=(16,), heads=(1,), depths=(1,)),
            pretrained=tmp_path / "other.pth",
        )


def test_results_are_plain_json(root: Path, tmp_path: Path) -> None:
    module = seeded(num_classes=4)
    data = tiny_scenes(root, class_names=(*CLASSES, "never"))
    tiny_trainer(tmp_path, callbacks=[SegmentationTable()]).test(module, data, verbose=False)
    content = json.loads((tmp_path / "segmentation.json").read_text())
    assert content["acc"][3] is None
    assert content["points"][3] == 0


def test_no_labelled_point_gives_no_nan(root: Path) -> None:
    module = seeded()
    batch: LabelledBatch = next(iter(tiny_scenes(root).train_dataloader()))
    loss, _ = module._loss(module(batch), torch.full_like(batch["segment"], -1))
    loss.backward()
    assert loss == 0
    assert module.network.head.weight.grad is not None
    assert module.network.head.weight.grad.abs().max() == 0
