"""DocumentsAndPhotographs on the embedded images: batches, epochs, workers, resumes, gallery."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor

from datamodules.documents import DocumentBatch, DocumentsAndPhotographs
from datamodules.documents.gallery import main
from tests.quiet_trainings import SaveAt, quiet_trainer

SMALL: dict[str, Any] = {
    "batch_size": 4,
    "eval_batch_size": 8,
    "train_size": 18,
    "val_size": 10,
    "test_size": 12,
}
FIELDS = ("image", "kind", "region", "item_token", "scene", "index", "complexity")


def small(**arguments: object) -> DocumentsAndPhotographs:
    return DocumentsAndPhotographs(**(SMALL | arguments))


def joined(batches: Iterable[DocumentBatch]) -> dict[str, Tensor]:
    held = list(batches)
    return {field: torch.cat([batch[field] for batch in held]) for field in FIELDS}  # type: ignore[literal-required]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for field in FIELDS:
        assert torch.equal(one[field], other[field]), field


def by_index(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    order = batch["index"].argsort()
    return {field: value[order] for field, value in batch.items()}


def test_the_default_batch() -> None:
    data = DocumentsAndPhotographs()
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == set(FIELDS)
    assert batch["image"].shape == (64, 3, 96, 96)
    assert batch["image"].dtype == batch["complexity"].dtype == torch.float32
    assert batch["image"].is_contiguous()
    assert -1 <= batch["image"].min() < -0.7
    assert 0.7 < batch["image"].max() <= 1
    levels = (batch["image"] + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    shapes = {field: tuple(batch[field].shape) for field in FIELDS[1:]}
    assert shapes == {
        "kind": (64,),
        "region": (64, 4),
        "item_token": (64, 144),
        "scene": (64,),
        "index": (64,),
        "complexity": (64,),
    }
    assert {batch[field].dtype for field in FIELDS[1:6]} == {torch.int64}
    assert batch["kind"].unique().tolist() == [0, 1]
    assert torch.equal(batch["kind"], (batch["scene"] >= 12).long())
    assert not batch["complexity"].any()
    assert data.grid == (12, 12)
    assert (data.image_size, data.patch_size) == (96, 8)
    assert (len(data.region_names), len(data.scene_names)) == (27, 16)
    assert data.region_names[:2] == ("nothing", "digit 0")
    assert data.kind_names == ("page", "photograph")
    assert data.source_name == "procedural pages, real digits and photographs"
    assert len(data.train_dataloader()) == 8192 // 64


def test_evaluation_is_the_same_for_every_seed_and_has_complexities() -> None:
    one, other = small(), small(seed=7, batch_size=2, eval_batch_size=5, num_workers=0)
    for name, count in (("val_dataloader", 10), ("test_dataloader", 12)):
        batch = joined(getattr(one, name)())
        assert_same(batch, joined(getattr(other, name)()))
        assert batch["index"].tolist() == list(range(count))
        assert (batch["complexity"] > 2000).all()
        assert len(batch["complexity"].unique()) > 5
    longer = joined(small(test_size=14).test_dataloader())
    assert torch.equal(longer["image"][:12], joined(one.test_dataloader())["image"])
    assert not torch.equal(longer["image"][:10], joined(one.val_dataloader())["image"])


def test_predict_takes_the_first_test_images() -> None:
    data = small(predict_count=5)
    predicted, tested = joined(data.predict_dataloader()), joined(data.test_dataloader())
    assert predicted["index"].tolist() == list(range(5))
    assert torch.equal(predicted["image"], tested["image"][:5])
    assert len(joined(small(predict_count=50).predict_dataloader())["index"]) == 12


def test_training_images_are_fresh_in_every_epoch_and_for_every_seed() -> None:
    loader = small(train_size=16).train_dataloader()
    epochs = [by_index(joined(loader)) for _ in range(2)]
    again = small(train_size=16).train_dataloader()
    for epoch in epochs:
        assert_same(epoch, by_index(joined(again)))
    other = by_index(joined(small(train_size=16, seed=1).train_dataloader()))
    for one, two in ((epochs[0], epochs[1]), (epochs[0], other)):
        assert one["index"].tolist() == list(range(16))
        assert (one["image"] != two["image"]).flatten(1).any(1).all()
        assert not torch.equal(one["region"], two["region"])
    assert_same(epochs[0], joined(small(train_size=16).train_eval_dataloader()))


def test_batches_do_not_depend_on_workers_or_batch_size() -> None:
    plain, parallel = small(), small(num_workers=2)
    left, right = plain.train_dataloader(), parallel.train_dataloader()
    for _ in range(2):
        assert_same(joined(left), joined(right))
    assert_same(joined(plain.val_dataloader()), joined(parallel.val_dataloader()))
    one, other = (small(train_size=16, batch_size=size) for size in (16, 2))
    assert_same(joined(one.train_dataloader()), joined(other.train_dataloader()))


def test_a_loader_resumes_in_the_middle_of_an_epoch() -> None:
    whole = small().train_dataloader()
    batches = [*whole, *whole]
    stopped = small().train_dataloader()
    list(stopped)
    for _, _ in zip(range(2), stopped, strict=False):
        pass
    resumed = small(num_workers=1).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    assert_same(joined(resumed), joined(batches[4 + 2 :]))


def test_patches_of_other_sizes() -> None:
    fine, coarse = (small(patch_size=size) for size in (4, 16))
    assert (fine.grid, coarse.grid) == ((24, 24), (6, 6))
    tokens = [joined(data.test_dataloader())["item_token"] for data in (fine, coarse)]
    assert [token.shape[1] for token in tokens] == [576, 36]
    # Every item that a large patch has, one of its small ones has too.
    large = tokens[1] > 0
    inside = tokens[0].reshape(12, 6, 4, 6, 4).amax((2, 4)).flatten(1)
    assert torch.equal(inside[large], tokens[1][large])


class Recorder(LightningModule):
    """Keeps the images' indices and sums."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[list[int], float]] = []
        self.stages: list[str] = []

    def training_step(self, batch: DocumentBatch, batch_idx: int) -> Tensor:
        self.seen.append((batch["index"].tolist(), float(batch["image"].double().sum())))
        return self.layer(batch["image"].mean().view(1, 1)).sum()

    def validation_step(self, batch: DocumentBatch, batch_idx: int) -> None:
        self.stages.append("val")

    def test_step(self, batch: DocumentBatch, batch_idx: int) -> None:
        self.stages.append("test")

    def predict_step(self, batch: DocumentBatch, batch_idx: int) -> Tensor:
        return batch["index"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_runs_all_stages_and_resumes_mid_epoch(tmp_path: Path) -> None:
    data, module = small(), Recorder()
    settings: dict[str, Any] = {"max_epochs": 2, "num_sanity_val_steps": 0}
    runner = quiet_trainer(tmp_path, callbacks=[SaveAt(tmp_path / "6.ckpt", 6)], **settings)
    runner.fit(module, data)
    runner.test(module, data, verbose=False)
    predicted = runner.predict(module, data)
    assert module.stages == ["val", "val"] * 2 + ["test", "test"]
    assert torch.cat(predicted).tolist() == list(range(12))  # type: ignore[arg-type]
    resumed = Recorder()
    quiet_trainer(tmp_path, **settings).fit(resumed, small(), ckpt_path=tmp_path / "6.ckpt")
    assert resumed.seen == module.seen[6:]


def test_overfitting_sees_the_same_images_in_every_epoch(tmp_path: Path) -> None:
    module = Recorder()
    quiet_trainer(tmp_path, max_epochs=2, overfit_batches=1).fit(module, small())
    assert module.seen[0][0] == [0, 1, 2, 3]
    assert module.seen[0] == module.seen[1]


def test_the_fingerprint_is_that_of_the_data() -> None:
    one = small().data_fingerprint
    assert len(one) == 16
    assert small(seed=3, batch_size=2, num_workers=2).data_fingerprint == one
    others = {
        small(patch_size=4).data_fingerprint,
        small(val_size=11).data_fingerprint,
        small(train_size=19).data_fingerprint,
    }
    assert len(others | {one}) == 4


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_gallery_shows_the_images_with_their_labels(split: str, tmp_path: Path) -> None:
    file = tmp_path / "gallery.png"
    main(["--out", str(file), "--split", split, "--count", "7"])
    with Image.open(file) as sheet:
        assert sheet.size == (6 * 202 + 10, 2 * 248 + 10)
        picture = sheet.crop((10, 10, 202, 202)).resize((96, 96), Image.Resampling.NEAREST)
    loader = f"{split}_eval_dataloader" if split == "train" else "test_dataloader"
    image = joined(getattr(small(**{f"{split}_size": 7}), loader)())["image"][0]
    levels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0)
    assert picture.tobytes() == levels.numpy().tobytes()


def test_the_gallery_wants_at_least_one_image(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", "x.png", "--count", "0"])
    assert "--count=0: must be >= 1" in capsys.readouterr().err
