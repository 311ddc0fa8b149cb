"""The judge: a classifier of real images whose verdict on generated ones measures them.

How often the judge recognises the class that was asked for is the share of class-conditional
samples that are of their class. The judge errs too, so its own accuracy on real test images
belongs beside the result: samples above it are more typical than the data, not better.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules.metrics.judge_training import JudgeSettings, LabelledImages, fit_classifier
from lightning_modules.pictures import from_bytes, to_bytes
from lightning_modules.whole_files import whole_file
from models.layers.convnet import ConvNetClassifier

# Part of the cache key: raise it when the network or its training changes.
JUDGE_VERSION = 2

Result = TypeVar("Result")


class JudgedData(Protocol):
    """What ``train_judge`` needs of a datamodule; batches are dicts with ``ImageBatch``'s keys."""

    image_size: int
    channels: Any
    horizontal_flip: bool

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def data_fingerprint(self) -> str:
        """A text that changes with the images."""

    def train_eval_dataloader(self) -> Iterable[Any]:
        """Real training images, not augmented, each once over all ranks."""

    def test_dataloader(self) -> Iterable[Any]:
        """Real test images, each once over all ranks."""


class Judge(nn.Module):
    """A frozen classifier: images (B, C, H, W) in [-1, 1] -> class probabilities (B, num_classes).

    Args:
        network: the trained classifier.
        mirrored: whether it also looks at the mirrored image and averages; only sensible if it
            was trained with mirrored images.
        accuracy: its accuracy on real test images, in [0, 1].
        test_images: how many these were.
    """

    def __init__(
        self, network: ConvNetClassifier, mirrored: bool, accuracy: float, test_images: int
    ) -> None:
        super().__init__()
        # One layout, wherever the weights come from, so that verdicts are equal to the last bit.
        self.network = network.to(memory_format=torch.channels_last)
        self.mirrored = mirrored
        self.accuracy = accuracy
        self.test_images = test_images
        self.eval()
        self.requires_grad_(False)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.network.head.out_features

    def train(self, mode: bool = True) -> Self:
        """Ignores ``mode``: an evaluator whose batch norm adapts is no fixed measure."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Class probabilities (B, num_classes) of images (B, C, H, W) in [-1, 1]."""
        probabilities: Tensor = self.network(images).softmax(1)
        if not self.mirrored:
            return probabilities
        mirrored: Tensor = self.network(images.flip(-1)).softmax(1)
        return (probabilities + mirrored) / 2


def train_judge(
    data: JudgedData,
    cache_dir: Path,
    settings: JudgeSettings | None = None,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> Judge:
    """Returns a judge for ``data``, from ``cache_dir`` or newly trained and then kept there.

    Under DDP every rank has to call it: rank 0 trains on the images of all ranks and hands out the
    result. The same data, settings and machine give the same judge.

    Args:
        data: datamodule with real images of 8 to 64 pixels.
        cache_dir: folder for trained judges, made if missing.
        settings: how to train; ``None`` takes the defaults.
        device: where to train; the judge comes back on the CPU.
        show_progress: draw a progress bar while training.

    Raises:
        ValueError: the images are too small or too large.
        RuntimeError: training failed on rank 0.
    """
    settings = settings or JudgeSettings()
    device = torch.device(device)
    mirrored = data.horizontal_flip
    with torch.device("meta"):  # draws no random numbers, so the caller's stay untouched
        network = ConvNetClassifier(
            data.image_size, data.channels, data.num_classes, settings.width
        )
    path = cache_dir / f"judge-{_cache_key(data.data_fingerprint, mirrored, settings)}.safetensors"
    cached = _from_rank_zero(lambda: _load(path, network, mirrored))
    if cached is not None:
        return cached
    train, test = _collect(data.train_eval_dataloader()), _collect(data.test_dataloader())

    def train_and_keep() -> Judge:
        fitted = fit_classifier(train, data.num_classes, mirrored, settings, device, show_progress)
        judge = Judge(fitted.cpu(), mirrored, 0.0, len(test))
        judge.accuracy = _accuracy(judge, test)
        _save(judge, path)
        return judge

    return _from_rank_zero(train_and_keep)


def _cache_key(fingerprint: str, mirrored: bool, settings: JudgeSettings) -> str:
    parts = (JUDGE_VERSION, fingerprint, mirrored, sorted(asdict(settings).items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _ranks() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _from_rank_zero(make: Callable[[], Result]) -> Result:
    """Calls ``make`` on rank 0 and returns its result on every rank; a failure raises on all."""
    rank, world_size = _ranks()
    if world_size == 1:
        return make()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if rank == 0:
        try:
            outcome[0] = make()
        except Exception as error:  # the other ranks wait below and would wait for ever
            failure, outcome[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise RuntimeError(f"rank 0 could not make the judge: {outcome[1]}") from failure
    result: Result = outcome[0]
    return result


def _collect(batches: Iterable[Mapping[str, Tensor]]) -> LabelledImages:
    """Holds a split in memory as bytes, in the order of its index, from all ranks.

    Lightning calls test hooks in inference mode; tensors made there could not be trained on.
    """
    with torch.inference_mode(False):
        parts = [
            (to_bytes(batch["image"].clone()), batch["label"].clone(), batch["index"].clone())
            for batch in batches
        ]
        _, world_size = _ranks()
        if world_size > 1:
            gathered: list[Any] = [None] * world_size
            dist.all_gather_object(gathered, parts)
            parts = [part for of_rank in gathered for part in of_rank]
        if not parts:
            raise ValueError("no real images to train or test the judge on: the split is empty")
        levels, labels, index = (torch.cat(column) for column in zip(*parts, strict=True))
        order = index.argsort()
        return LabelledImages(levels[order], labels[order])


def _accuracy(judge: Judge, data: LabelledImages, batch_size: int = 500) -> float:
    right = 0
    for chosen in torch.split(torch.arange(len(data)), batch_size):
        verdicts = judge(from_bytes(data.levels[chosen])).argmax(1)
        right += int((verdicts == data.labels[chosen]).sum())
    return right / len(data)


def _save(judge: Judge, path: Path) -> None:
    """Writes the judge under a temporary name first, so that no reader sees half a file."""
    state = {key: value.contiguous() for key, value in judge.network.state_dict().items()}
    metadata = {"accuracy": repr(judge.accuracy), "test_images": str(judge.test_images)}
    with whole_file(path) as temporary:
        save_file(state, temporary, metadata)


def _load(path: Path, network: ConvNetClassifier, mirrored: bool) -> Judge | None:
    """The judge kept at ``path``; ``None`` if there is none or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata, keys = file.metadata(), list(file.keys())
            state = {key: file.get_tensor(key) for key in keys}
        network.load_state_dict(state, assign=True)
        return Judge(network, mirrored, float(metadata["accuracy"]), int(metadata["test_images"]))
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError):
        return None
