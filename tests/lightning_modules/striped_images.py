"""A tiny labelled data set of stripes, light enough to import for a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_modules.metrics.judge_training import JudgeSettings

FEW_STEPS = JudgeSettings(width=4, epochs=4, batch_size=16)


def striped(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of 8 x 8 with horizontal (class 0) or vertical (class 1) stripes, and noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    stripes = (torch.arange(8) % 2 * 1.0 - 0.5).expand(8, 8)
    images = torch.where(labels.view(-1, 1, 1) == 1, stripes, stripes.T)[:, None]
    return images + 0.1 * torch.randn(images.shape, generator=generator), labels


@dataclass
class Stripes:
    """A datamodule of stripes that counts how often its training images are read."""

    image_size: int = 8
    channels: int = 1
    num_classes: int = 2
    horizontal_flip: bool = True
    data_fingerprint: str = "stripes"
    reads: list[str] = field(default_factory=list)

    def _batches(self, count: int, seed: int) -> Iterator[dict[str, Tensor]]:
        images, labels = striped(count, seed)
        for index in torch.arange(count).split(30):
            yield {"image": images[index], "label": labels[index], "index": index}

    def train_eval_dataloader(self) -> Iterator[dict[str, Tensor]]:
        self.reads.append("train")
        return self._batches(160, seed=0)

    def test_dataloader(self) -> Iterator[dict[str, Tensor]]:
        return self._batches(40, seed=1)
