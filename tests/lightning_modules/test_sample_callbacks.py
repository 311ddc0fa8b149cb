"""Sample grids and prediction files, written by a real Trainer."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.callbacks.prediction_writer import PredictionWriter
from lightning_modules.callbacks.sample_grid import SampleGrid
from lightning_modules.pictures import from_bytes
from tests.quiet_trainings import quiet_trainer

CLASSES = ("cat", "dog", "eel")


class Greys(LightningModule):
    """Draws flat images: level 40 * label + 10 * weight, and remembers how it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.asked: list[tuple[int, int, bool]] = []

    def draw_samples(self, labels: Tensor, seed: int) -> Tensor:
        self.asked.append((len(labels), seed, torch.is_grad_enabled()))
        levels = (40 * labels + 10 * self.weight).round().to(torch.uint8)
        return from_bytes(levels).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return -self.weight

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None: ...

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None: ...

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        images = self.draw_samples(batch["label"], 0)
        return {"image": images, **batch, "guidance": {"scale": 2.0}}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Requests(LightningDataModule):
    class_names = CLASSES

    def __init__(self, count: int = 7) -> None:
        super().__init__()
        self.count = count

    def train_dataloader(self) -> DataLoader[Any]:
        samples = [{"label": i % 3, "index": i} for i in range(self.count)]
        return DataLoader(samples, batch_size=4)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def trainer(folder: Path, callbacks: Sequence[Callback], **options: Any) -> Trainer:  # noqa: ANN401
    return quiet_trainer(folder, callbacks=list(callbacks), **({"max_epochs": 4} | options))


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L"))


def levels_of(path: Path) -> set[int]:
    """Grey levels of the pictures in a grid, without paper and ink (both of 38 and above 200)."""
    pixels = pixels_of(path)[16:-16, -70:-20]
    return set(pixels[32::67].flatten().tolist()) - {255}


def test_every_second_validation_and_none_in_the_sanity_check(tmp_path: Path) -> None:
    module = Greys()
    grid = SampleGrid(every_n_validations=2, samples_per_class=2, batch_size=4, seed=5)
    trainer(tmp_path, [grid]).fit(module, Requests())
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["samples-step000004.png", "samples-step000008.png"]
    assert module.asked == [(4, 5, False), (2, 6, False)] * 2
    assert grid.state_dict() == {"validations": 4}


@pytest.mark.parametrize("grid_first", [True, False])
def test_draws_with_averaged_weights_whatever_the_order(tmp_path: Path, grid_first: bool) -> None:
    average = EMAWeightAveraging(decay=0.5, update_every_n_steps=1, update_starting_at_step=0)
    callbacks: list[Callback] = [SampleGrid(samples_per_class=1), average]
    run = trainer(tmp_path, callbacks if grid_first else callbacks[::-1], max_epochs=1)
    run.fit(Greys(), Requests())
    # After two steps of 1 the weight is 2; its average with decay 1/2 is 1.25 or 1.5.
    (picture,) = (tmp_path / "pictures").iterdir()
    weight = min(levels_of(picture)) / 10
    assert 1.0 < weight < 1.8


def test_test_grid_goes_to_the_run_and_to_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    run = trainer(tmp_path, [SampleGrid(samples_per_class=2, max_classes=2)], logger=logger)
    run.test(Greys(), Requests(), verbose=False)
    logger.experiment.finish()
    picture = pixels_of(tmp_path / "pictures" / "samples-test.png")
    assert len(picture) == 16 + 64 + 3 + 64 + 16
    media = list(tmp_path.glob("wandb/offline-run-*/files/media/images/test/samples_*.png"))
    assert len(media) == 1
    assert np.array_equal(pixels_of(media[0]), picture)


def test_grid_refuses_modules_that_cannot_draw_and_bad_numbers(tmp_path: Path) -> None:
    class Silent(Greys):
        draw_samples = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match="Silent has no draw_samples"):
        trainer(tmp_path, [SampleGrid()]).fit(Silent(), Requests())
    with pytest.raises(ValueError, match="samples_per_class=0: must be >= 1"):
        SampleGrid(samples_per_class=0)
    with pytest.raises(ValueError, match="every_n_validations=-1"):
        SampleGrid(every_n_validations=-1)


def test_trial_runs_leave_nothing(tmp_path: Path) -> None:
    callbacks = [SampleGrid(), PredictionWriter()]
    trainer(tmp_path, callbacks, fast_dev_run=True).fit(Greys(), Requests())
    trainer(tmp_path, callbacks, fast_dev_run=True).predict(Greys(), Requests())
    assert not (tmp_path / "pictures").exists()
    assert not (tmp_path / "predictions").exists()


def predict(folder: Path, count: int) -> dict[str, Any]:
    run = trainer(folder, [PredictionWriter()])
    run.predict(Greys(), Requests(count), return_predictions=False)
    index: dict[str, Any] = json.loads((folder / "predictions" / "index.json").read_text())
    return index


def test_predictions_are_indexed_files(tmp_path: Path) -> None:
    index = predict(tmp_path, 7)
    assert index["settings"] == {"guidance": {"scale": 2.0}}
    assert [sample["index"] for sample in index["samples"]] == list(range(7))
    assert index["samples"][5] == {"index": 5, "label": 2, "class": "eel", "file": "000005.png"}
    pixels = pixels_of(tmp_path / "predictions" / "000005.png")
    assert pixels.shape == (8, 8)
    assert (pixels == 80).all()


def test_a_smaller_predict_leaves_no_stale_samples(tmp_path: Path) -> None:
    predict(tmp_path, 7)
    (tmp_path / "predictions" / "mine.png").write_bytes(b"kept")
    predict(tmp_path, 2)
    names = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert names == ["000000.png", "000001.png", "index.json", "mine.png"]


def test_predictions_of_another_shape_are_refused(tmp_path: Path) -> None:
    class Tuples(Greys):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:  # noqa: ANN401
            return (batch["label"],)

    with pytest.raises(TypeError, match=r"Tuples\.predict_step returned tuple"):
        trainer(tmp_path, [PredictionWriter()]).predict(Tuples(), Requests())


RANK = """
import sys
from pathlib import Path
from tests.lightning_modules.test_sample_callbacks import (
    Greys, PredictionWriter, Requests, SampleGrid, trainer)
grid = SampleGrid(samples_per_class=1)
run = trainer(Path(sys.argv[1]), [grid, PredictionWriter()], strategy="ddp", devices=2)
run.test(Greys(), Requests(), verbose=False)
run.predict(Greys(), Requests(), return_predictions=False)
"""


@pytest.mark.ddp
def test_two_ranks_write_one_index_and_one_grid(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    subprocess.run([sys.executable, str(script), str(tmp_path)], timeout=240, check=True)
    index = json.loads((tmp_path / "predictions" / "index.json").read_text())
    assert [sample["index"] for sample in index["samples"]] == list(range(7))
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == [
        *(f"{number:06d}.png" for number in range(7)),
        "index.json",
    ]
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["samples-test.png"]
