"""Tiny pages, encoders and trainers that store features, for tests."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import Dataset

from datamodules.documents.batch import DocumentBatch
from datamodules.loading import (
    EpochSampler,
    EvaluationSampler,
    OrderedLoader,
    ResumableLoader,
    keyed_generator,
    rank_and_world_size,
)
from lightning_modules.callbacks.feature_cache_writer import FeatureCacheWriter
from lightning_modules.feature_extraction import FeatureExtraction
from models.image_encoders.encoder_towers import TimmTower
from models.image_encoders.frozen_encoder import FrozenEncoder
from tests.quiet_trainings import quiet_trainer

HALF = (0.5, 0.5, 0.5)
LABELS = ("kind", "region", "item_token", "scene", "index", "complexity")


class Pages(Dataset[DocumentBatch]):
    """Noise images of 16 x 16 pixels; unusable ones are replaced by the next."""

    def __init__(self, count: int, unusable: tuple[int, ...] = ()) -> None:
        self.count, self.unusable = count, unusable

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, pairs: list[tuple[int, int]]) -> DocumentBatch:
        numbers = [i + 1 if i in self.unusable else i for i, _ in pairs]
        index = torch.tensor(numbers)
        images = [torch.rand(3, 16, 16, generator=keyed_generator(i)) * 2 - 1 for i in numbers]
        return {
            "image": torch.stack(images),
            "kind": index % 2,
            "region": index[:, None] % torch.tensor([5, 6, 7, 8]),
            "item_token": index[:, None] % torch.arange(1, 17),
            "scene": index % 3,
            "index": index,
            "complexity": index * 1.5,
        }


class TinyPages(LightningDataModule):
    """What `FeatureCacheWriter` needs of a data module."""

    kind_names, region_names, scene_names = ("page", "photograph"), ("", "1", "2"), ("a", "b", "c")
    source_name = "noise"

    def __init__(
        self,
        split: str = "train",
        count: int = 23,
        fingerprint: str = "0123456789abcdef",
        unusable: tuple[int, ...] = (),
        grid: tuple[int, int] = (4, 4),
        seed: int = 0,
        eval_batch_size: int = 3,
    ) -> None:
        super().__init__()
        self.predict_split, self.data_fingerprint = split, fingerprint
        self.eval_batch_size = eval_batch_size
        self.pages, self.grid, self.seed = Pages(count, unusable), grid, seed

    def train_dataloader(self) -> ResumableLoader:
        sampler = EpochSampler(len(self.pages), 4, seed=self.seed)
        return ResumableLoader(self.pages, sampler, trainer=self.trainer)

    def val_dataloader(self) -> OrderedLoader:
        return self.predict_dataloader()

    def predict_dataloader(self) -> OrderedLoader:
        rank, world_size = rank_and_world_size(self.trainer)
        sampler = EvaluationSampler(
            len(self.pages), self.eval_batch_size, rank=rank, world_size=world_size
        )
        return OrderedLoader(self.pages, sampler)


def tiny_encoder(
    layer: int = -1,
    seed: int = 0,
    class_token: bool = True,
    image_size: int = 16,
    patch_size: int = 4,
) -> FrozenEncoder:
    """Vision transformer of width 16."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=16,
            depth=2,
            num_heads=2,
            num_classes=0,
            class_token=class_token,
            global_pool="token" if class_token else "avg",
        )
    return FrozenEncoder(TimmTower(network), layer, HALF, HALF)


def tiny_trainer(folder: Path, **changes: Any) -> Trainer:  # noqa: ANN401
    """CPU trainer that writes nothing of its own accord."""
    options: dict[str, Any] = {"max_epochs": 1, "use_distributed_sampler": False}
    return quiet_trainer(folder, **{**options, **changes})


def store(
    folder: Path,
    data: LightningDataModule | None = None,
    encoder: FrozenEncoder | None = None,
    writer: dict[str, Any] | None = None,
    **trainer: Any,  # noqa: ANN401
) -> int:
    """Store features in ``folder``; returns how many images were encoded for it."""
    encoder = encoder or tiny_encoder()
    seen: list[int] = []
    handle = encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    options = {"shard_images": 6, **(writer or {})}
    callbacks = [FeatureCacheWriter(folder, **options), *trainer.pop("callbacks", [])]
    tiny_trainer(folder, callbacks=callbacks, **trainer).predict(
        FeatureExtraction(encoder), data or TinyPages(), return_predictions=False
    )
    handle.remove()
    return sum(seen)
