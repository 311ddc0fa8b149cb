"""What `test` says of class-conditional samples, with a judge and features that can be foreseen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.callbacks import sample_quality
from lightning_modules.callbacks.sample_quality import SampleQuality
from lightning_modules.metrics.frechet import FrechetDistance
from lightning_modules.metrics.judge import Judge
from tests.quiet_trainings import quiet_trainer

CLASSES = 2


class Halves(LightningModule):
    """Class 0 is dark, class 1 bright; unguided, every second sample of class 1 is dark too."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[list[int], int, float | None]] = []

    def draw_samples(self, labels: Tensor, seed: int, scale: float | None = None) -> Tensor:
        self.asked.append((labels.tolist(), seed, scale))
        level = 2.0 * labels - 1
        if scale == 0:
            wrong = (labels == 1) & (torch.arange(seed, seed + len(labels)) % 4 == 1)
            level = level.masked_fill(wrong, -1.0)
        return level.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None: ...


class Data(LightningDataModule):
    num_classes = CLASSES

    def _batches(self, count: int) -> DataLoader[dict[str, Tensor]]:
        items = [
            {
                "image": torch.full((1, 8, 8), 2.0 * (place % 2) - 1),
                "label": torch.tensor(place % 2),
            }
            for place in range(count)
        ]
        return DataLoader(items, batch_size=4)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._batches(8)

    def train_eval_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._batches(40)


class Brightness(nn.Module):
    """Judges and describes an image by its mean."""

    feature_dim, name = 1, "brightness"

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))[:, None]


class Verdicts(Brightness):
    def forward(self, images: Tensor) -> Tensor:
        bright = super().forward(images)
        return torch.cat([-bright, bright], 1)


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> SampleQuality:
    judge = Judge(Verdicts(), mirrored=False, accuracy=0.9, test_images=8)  # type: ignore[arg-type]
    monkeypatch.setattr(sample_quality, "train_judge", lambda data, cache: judge)
    callback = SampleQuality(samples_per_class=6, guidance_scales=(0.0, 2.0), batch_size=5)
    distance = FrechetDistance(Brightness())
    monkeypatch.setattr(callback, "_build_frechet", lambda module: distance)
    return callback


def test_accuracy_and_distance_of_every_scale(quality: SampleQuality, tmp_path: Path) -> None:
    module = Halves()
    trainer = quiet_trainer(tmp_path, callbacks=[quality])
    trainer.test(module, Data(), verbose=False)
    found = trainer.callback_metrics
    assert found["test/judge_accuracy_on_real"] == pytest.approx(0.9)
    assert found["test/accuracy_w0"] == pytest.approx(9 / 12)  # 3 of 6 of class 1 are dark
    assert found["test/accuracy_w2"] == 1
    # Real and guided images are half dark, half bright; unguided ones three fourths dark.
    assert found["test/frechet_brightness_w2"] == pytest.approx(0, abs=0.02)
    assert float(found["test/frechet_brightness_w0"]) > 0.2
    assert found["test/frechet_brightness_real_train"] == pytest.approx(0, abs=0.02)
    assert (tmp_path / "pictures" / "guidance.png").is_file()


def test_samples_are_balanced_and_keyed_by_their_number(
    quality: SampleQuality, tmp_path: Path
) -> None:
    module = Halves()
    quiet_trainer(tmp_path, callbacks=[quality]).test(module, Data(), verbose=False)
    for scale in (0.0, 2.0):
        calls = [call for call in module.asked if call[2] == scale]
        assert [seed for _, seed, _ in calls] == [0, 5, 10]
        labels = [label for part, _, _ in calls for label in part]
        assert labels == [0, 1] * 6


@pytest.mark.parametrize(
    "wrong", [{"samples_per_class": 0}, {"batch_size": 0}, {"guidance_scales": (0.0, -1.0)}]
)
def test_ranges(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be >="):
        SampleQuality(**wrong)  # type: ignore[arg-type]
