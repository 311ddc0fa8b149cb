"""Training of the judge: a few passes over the real images, reproducible from its settings."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.metrics.muon import Muon
from lightning_modules.pictures import from_bytes
from lightning_modules.progress import progress_bar
from models.layers.convnet import ConvNetClassifier


@dataclass(frozen=True)
class JudgeSettings:
    """How a judge is trained.

    Attributes:
        width: channels of its first layer.
        epochs: passes over the real training images.
        batch_size: images per step.
        kernel_lr: peak rate of Muon, for the convolutions.
        lr: peak rate of AdamW, for everything else.
        weight_decay: of AdamW.
        label_smoothing: share of the target spread over all classes.
        erased_share: share of the images in which a square as wide as a third of the image is
            blackened around a random pixel, so that no single part decides.
        noisy_share: share of the images that get Gaussian noise, since samples are never as clean
            as data.
        noise: its largest deviation; each image draws its own below that, on the [-1, 1] scale.
        seed: key of the initial weights, the order and the augmentation.
    """

    width: int = 16
    epochs: int = 6
    batch_size: int = 128
    kernel_lr: float = 0.03
    lr: float = 4e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.1
    erased_share: float = 0.5
    noisy_share: float = 0.25
    noise: float = 0.1
    seed: int = 0


class LabelledImages:
    """All images of a split in memory, as bytes.

    Args:
        levels: (N, C, H, W) uint8.
        labels: (N,) int64.
    """

    def __init__(self, levels: Tensor, labels: Tensor) -> None:
        self.levels = levels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)


def fit_classifier(
    data: LabelledImages,
    num_classes: int,
    mirrored: bool,
    settings: JudgeSettings,
    device: torch.device,
    show_progress: bool,
) -> ConvNetClassifier:
    """Trains a classifier on ``data`` without touching the global random state.

    Works inside ``torch.inference_mode`` too, where Lightning runs its test hooks.

    Args:
        data: real training images.
        num_classes: number of classes.
        mirrored: whether half of the images are mirrored, anew in every epoch.
        settings: see ``JudgeSettings``.
        device: where to train.
        show_progress: draw a progress bar on the terminal.

    Returns:
        The trained network in evaluation mode, on ``device``.
    """
    channels, size = data.levels.shape[1], data.levels.shape[-1]
    with torch.inference_mode(False), torch.enable_grad():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            network = ConvNetClassifier(size, channels, num_classes, settings.width)
        network.to(device).to(memory_format=torch.channels_last).train()
        _optimise(network, data, mirrored, settings, show_progress)
    return network.eval()


def _optimise(
    network: ConvNetClassifier,
    data: LabelledImages,
    mirrored: bool,
    settings: JudgeSettings,
    show_progress: bool,
) -> None:
    device = network.head.weight.device
    steps = settings.epochs * -(-len(data) // settings.batch_size)
    optimisers = _optimisers(network, settings)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
        for optimiser in optimisers
    ]
    with progress_bar(show_progress) as progress:
        task = progress.add_task("Training the judge", total=steps)
        for images, labels in _batches(data, mirrored, settings):
            images = images.to(device, memory_format=torch.channels_last)
            loss = F.cross_entropy(
                network(images), labels.to(device), label_smoothing=settings.label_smoothing
            )
            loss.backward()  # type: ignore[no-untyped-call]
            for optimiser, schedule in zip(optimisers, schedules, strict=True):
                optimiser.step()
                optimiser.zero_grad()
                schedule.step()
            progress.advance(task)


def _optimisers(network: nn.Module, settings: JudgeSettings) -> list[torch.optim.Optimizer]:
    parameters = list(network.parameters())
    kernels = [parameter for parameter in parameters if parameter.ndim == 4]
    others = [parameter for parameter in parameters if parameter.ndim != 4]
    return [
        Muon(kernels, settings.kernel_lr),
        torch.optim.AdamW(others, settings.lr, weight_decay=settings.weight_decay),
    ]


def _rate(step: int, steps: int, warm_up: float = 0.25) -> float:
    """Linear up to 1 over the first quarter, then linear down to 0."""
    return min((step + 1) / (warm_up * steps), (1 - step / steps) / (1 - warm_up), 1.0)


def _batches(
    data: LabelledImages, mirrored: bool, settings: JudgeSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented images (B, C, H, W) in about [-1, 1] and labels (B,), over all epochs."""
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        order = torch.randperm(len(data), generator=generator)
        for chosen in torch.split(order, settings.batch_size):
            images = from_bytes(data.levels[chosen])
            if mirrored:
                flips = _some(images, 0.5, generator)
                images[flips] = images[flips].flip(-1)
            _erase(images, settings.erased_share, generator)
            noisy = _some(images, settings.noisy_share, generator)
            shape = images[noisy].shape
            deviation = settings.noise * torch.rand(shape[0], 1, 1, 1, generator=generator)
            images[noisy] += deviation * torch.randn(shape, generator=generator)
            yield images, data.labels[chosen]


def _some(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A mask (B,) that is true for about this share of the images."""
    return torch.rand(len(images), generator=generator) < share


def _erase(images: Tensor, share: float, generator: torch.Generator) -> None:
    """Blackens, in place, a square in some of the images (B, C, H, W)."""
    count, _, height, width = images.shape
    reach = height // 6
    rows = torch.randint(height, (count, 1), generator=generator) - torch.arange(height)
    columns = torch.randint(width, (count, 1), generator=generator) - torch.arange(width)
    erased = (rows.abs() <= reach)[:, :, None] & (columns.abs() <= reach)[:, None, :]  # (B, H, W)
    erased &= _some(images, share, generator)[:, None, None]
    images.masked_fill_(erased[:, None], -1.0)
