"""What 1 to 1024 simulated processes are handed of the same data: every sample at most once."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image

from datamodules.documents.documents import DocumentsAndPhotographs
from datamodules.imagenet import ImageNetPixels
from datamodules.multiview import MultiviewRays
from datamodules.paired_2d3d.labelled_scenes import LabelledScenes
from datamodules.paired_2d3d.paired_scenes import PairedScenes
from datamodules.text_image.resident_pairs import ResidentPairs
from datamodules.text_image.text_image import TextImagePairs
from datamodules.token_features import TokenFeatures
from tests.datamodules.fixture_types import WriteTar
from tests.datamodules.paired_roots import paired_root
from tests.datamodules.scene_roots import write_chunks
from tests.datamodules.stored_features import features, write
from tests.lightning_modules.segmentation_runs import write_tree

RANKS = (1, 2, 4, 8, 64, 1024)
COUNT = 1100
PER_SHARD = 97


def picture(number: int) -> bytes:
    """An image of one colour that tells its number."""
    stream = io.BytesIO()
    colour = np.array([number % 256, number // 256, 0], dtype=np.uint8)
    Image.fromarray(np.broadcast_to(colour, (8, 8, 3)).copy()).save(stream, "PNG")
    return stream.getvalue()


def number_of(image: torch.Tensor) -> list[int]:
    """The numbers of images (B, 3, 8, 8) in [-1, 1]."""
    levels = ((image[:, :2, 0, 0] + 1) * 127.5).round().long()
    found: list[int] = (levels[:, 0] + 256 * levels[:, 1]).tolist()
    return found


def shards() -> Iterator[tuple[str, range]]:
    for start in range(0, COUNT, PER_SHARD):
        yield f"train-{start // PER_SHARD:04d}", range(start, min(start + PER_SHARD, COUNT))
    yield "val-0000", range(4)


def images_in_tars(folder: Path, write_tar: WriteTar) -> ImageNetPixels:
    for name, numbers in shards():
        files = {}
        for n in numbers:
            files |= {f"{n:06d}.png": picture(n), f"{n:06d}.cls": b"%d" % (n % 3)}
        write_tar(folder / f"{name}.tar", files)
    return ImageNetPixels(
        folder, format="webdataset", image_size=8, channels=3, horizontal_flip=False
    )


def images_in_parquet(folder: Path, _: WriteTar) -> ImageNetPixels:
    for name, numbers in shards():
        rows = [{"bytes": picture(n), "path": f"{n}.png"} for n in numbers]
        table = pa.table({"image": rows, "label": [n % 3 for n in numbers]})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=10)
    return ImageNetPixels(folder, format="parquet", image_size=8, channels=3, horizontal_flip=False)


def captions_in_tars(folder: Path, write_tar: WriteTar) -> TextImagePairs:
    for name, numbers in shards():
        files = {}
        for n in numbers:
            files |= {f"{n:06d}.png": picture(n), f"{n:06d}.txt": b"number %d" % n}
        write_tar(folder / f"{name}.tar", files)
    return TextImagePairs(folder, format="webdataset", image_size=8)


def captions_in_parquet(folder: Path, _: WriteTar) -> TextImagePairs:
    for name, numbers in shards():
        columns = {
            "image": [picture(n) for n in numbers],
            "caption": [f"number {n}" for n in numbers],
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return TextImagePairs(folder, format="parquet", image_size=8)


def stored_features(folder: Path, _: WriteTar) -> TokenFeatures:
    parts = [numbers for name, numbers in shards() if name.startswith("train")]
    write(folder, *parts, count=COUNT)
    write(folder, range(4), split="val")
    return TokenFeatures(folder)


def scene_chunks(folder: Path, _: WriteTar) -> MultiviewRays:
    write_chunks(folder / "train", {f"a{n:04d}": 3 for n in range(COUNT)}, per_chunk=PER_SHARD)
    write_chunks(folder / "test", {"b0": 3})
    return MultiviewRays(folder, image_size=6, context_views=(1, 1), target_views=1)


SHARDS = [
    images_in_tars,
    images_in_parquet,
    captions_in_tars,
    captions_in_parquet,
    stored_features,
    scene_chunks,
]


def loaders(data: Any, ranks: int, count: int = COUNT) -> Iterator[Any]:  # noqa: ANN401
    """The training loader of each of so many simulated processes, for ``count`` samples."""
    data.batch_size = max(1, min(8, count // ranks))
    for rank in range(ranks):
        place = {"rank": rank, "num_replicas": ranks}
        strategy = SimpleNamespace(
            distributed_sampler_kwargs=place, root_device=torch.device("cpu")
        )
        data.trainer = SimpleNamespace(
            strategy=strategy, overfit_batches=0, limit_train_batches=1.0, accumulate_grad_batches=1
        )
        yield data.train_dataloader()


def check_content(batch: dict[str, Any]) -> None:
    """A batch holds the samples that its indices name."""
    index = batch["index"].tolist()
    if "tokens" in batch:
        assert torch.equal(batch["tokens"], features(index)["tokens"])
    elif "image" in batch:
        assert number_of(batch["image"]) == index
    if "caption_full" in batch:
        assert list(batch["caption_full"]) == [f"number {n}" for n in index]


@pytest.mark.parametrize("make", SHARDS)
def test_shards_are_shared_out_without_overlap(
    make: Callable[[Path, WriteTar], LightningDataModule], tmp_path: Path, write_tar: WriteTar
) -> None:
    data = make(tmp_path, write_tar)
    for ranks in RANKS:
        seen, lengths = [], set()
        for loader in loaders(data, ranks):
            batches = list(loader)
            lengths.add(len(batches))
            for batch in batches:
                check_content(batch)
                seen += batch["index"].tolist()
        used = data.batch_size * ranks  # type: ignore[attr-defined]
        assert lengths == {COUNT // used}, ranks
        assert len(set(seen)) == len(seen) == COUNT // used * used, ranks
        assert set(seen) <= set(range(COUNT))


def test_workers_share_a_rank_of_shards(tmp_path: Path, write_tar: WriteTar) -> None:
    """Loading processes take turns at the batches of their rank; they choose no samples."""
    data = images_in_tars(tmp_path, write_tar)
    alone = [[batch["index"].tolist() for batch in loader] for loader in loaders(data, 2)]
    data.num_workers = 2
    shared = [[batch["index"].tolist() for batch in loader] for loader in loaders(data, 2)]
    assert shared == alone


def whole_folder(folder: Path, write_tar: WriteTar) -> dict[str, Any]:
    """Every data module, with a root below ``folder`` where it has to have one."""
    paired = paired_root(folder / "paired", train=8, points=60)
    (folder / "tars").mkdir()
    captions = captions_in_tars(folder / "tars", write_tar)
    return {
        "images": ImageNetPixels(embedded="digits", image_size=8, levels=17),
        "captions": captions,
        "resident captions": ResidentPairs(folder / "tars", image_size=8),
        "documents": DocumentsAndPhotographs(train_size=COUNT, val_size=8),
        "paired scenes": PairedScenes(paired),
        "labelled scenes": LabelledScenes(write_tree(folder / "labelled", (9, 1, 1))),
    }


def test_every_data_module_shares_its_samples_out(tmp_path: Path, write_tar: WriteTar) -> None:
    for name, data in whole_folder(tmp_path, write_tar).items():
        count = len(next(loaders(data, 1, 1)).dataset)
        for ranks in RANKS:
            if count < ranks:
                with pytest.raises(ValueError, match=f"{count} training samples: fewer than one"):
                    next(loaders(data, ranks, count))
                continue
            parts = [list(loader.batch_sampler) for loader in loaders(data, ranks, count)]
            assert len({len(part) for part in parts}) == 1
            seen = [index for part in parts for batch in part for index, _ in batch]
            assert len(set(seen)) == len(seen), (name, ranks)
            assert count - data.batch_size * ranks < len(seen) <= count, (name, ranks)
