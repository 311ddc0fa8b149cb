"""Text-image pairs: caption dropout, order, resume, shares of ranks, stored features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.testing import assert_close

from datamodules.errors import DataError
from datamodules.keyed_random import keyed_generator
from datamodules.loading import ResumableLoader
from datamodules.tensor_store import TensorStoreWriter
from datamodules.text_image.batch import TextImageBatch
from datamodules.text_image.text_image import TextImagePairs
from tests.datamodules.caption_roots import encoded, json_lines, levels, numbered_folder, small
from tests.datamodules.fixture_types import Fill
from tests.quiet_trainings import SaveAt, quiet_trainer


def epochs(loader: ResumableLoader, count: int) -> list[list[TextImageBatch]]:
    return [list(loader) for _ in range(count)]


def dropped(batches: list[TextImageBatch]) -> dict[int, bool]:
    return {
        index: caption == ""
        for batch in batches
        for index, caption in zip(batch["index"].tolist(), batch["caption"], strict=True)
    }


def assert_equal_batches(one: TextImageBatch, other: TextImageBatch) -> None:
    first, second = dict(one), dict(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, Tensor):
            assert_close(value, second[name], rtol=0, atol=0)
        else:
            assert value == second[name]


def test_dropout_is_keyed_by_seed_epoch_and_index(tmp_path: Path, fill: Fill) -> None:
    root = numbered_folder(fill, tmp_path, 202)
    options: dict[str, Any] = {"caption_dropout": 0.3, "batch_size": 50}
    first, second = epochs(small(root, **options).train_dataloader(), 2)
    assert len(dropped(first)) == 200
    assert 40 <= sum(dropped(first).values()) <= 80  # 60 on average, standard deviation 6.5
    assert dropped(first) != dropped(second)
    for batch in first:
        full = [f"caption {n}" for n in levels(batch["image"])]
        assert batch["caption_full"] == full
        assert all(
            caption in ("", whole) for caption, whole in zip(batch["caption"], full, strict=True)
        )
    # Another batch size, so another place in the batch: the same captions are dropped.
    other = small(root, caption_dropout=0.3, batch_size=25).train_dataloader()
    assert dropped(list(other)) == dropped(first)
    seeded = small(root, seed=1, **options).train_dataloader()
    assert dropped(list(seeded)) != dropped(first)
    assert sum(dropped(list(small(root, caption_dropout=1.0).train_dataloader())).values()) == 200
    data = small(root, **options)
    for loader in (data.train_eval_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert not any(dropped(list(loader)).values())


def test_random_crop_and_flip_are_keyed_and_only_in_training(tmp_path: Path, fill: Fill) -> None:
    import io

    import numpy as np
    from PIL import Image

    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (8, 32, 3))
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(ramp)).save(stream, "PNG")
    line = json_lines({"image": "x.png", "text": "x"})
    fill(tmp_path, {"train.jsonl": line * 40, "test.jsonl": line, "x.png": stream.getvalue()})
    plain = small(tmp_path, batch_size=40)
    centre = next(iter(plain.train_dataloader()))["image"]
    assert (centre == centre[:1]).all()
    data = small(tmp_path, batch_size=40, random_crop=True, random_flip=True)
    first, second = (epoch[0]["image"] for epoch in epochs(data.train_dataloader(), 2))
    assert len(first[:, 0, 0, 0].unique()) > 10
    mirrored = first[:, 0, 0, 0] > first[:, 0, 0, -1]
    assert 8 <= int(mirrored.sum()) <= 32
    assert not torch.equal(first, second)
    again = small(tmp_path, batch_size=40, random_crop=True, random_flip=True).train_dataloader()
    assert torch.equal(next(iter(again))["image"], first)
    assert torch.equal(next(iter(data.test_dataloader()))["image"], centre[:1])


@pytest.mark.parametrize("cache_decoded_mb", [0, 1])
def test_batches_do_not_depend_on_workers(
    cache_decoded_mb: int, tmp_path: Path, fill: Fill
) -> None:
    root = numbered_folder(fill, tmp_path, 14)
    options: dict[str, Any] = {"cache_decoded_mb": cache_decoded_mb, "caption_dropout": 0.5}
    alone = epochs(small(root, **options).train_dataloader(), 2)
    workers = epochs(small(root, num_workers=2, **options).train_dataloader(), 2)
    for own, theirs in zip(alone, workers, strict=True):
        assert len(own) == len(theirs) == 3
        for first, second in zip(own, theirs, strict=True):
            assert_equal_batches(first, second)


def test_an_epoch_goes_on_where_it_stopped(tmp_path: Path, fill: Fill) -> None:
    root = numbered_folder(fill, tmp_path, 18)
    options: dict[str, Any] = {"caption_dropout": 0.5, "random_flip": True}
    whole = epochs(small(root, **options).train_dataloader(), 3)
    loader = small(root, **options).train_dataloader()
    list(loader)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    state = loader.state_dict()
    resumed = small(root, num_workers=1, **options).train_dataloader()
    resumed.load_state_dict(state)
    for expected, found in zip((whole[1][2:], whole[2]), epochs(resumed, 2), strict=True):
        assert len(expected) == len(found)
        for first, second in zip(expected, found, strict=True):
            assert_equal_batches(first, second)


class Recorder(LightningModule):
    """Adds up what it sees, and stops after some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[list[int], list[str]]] = []

    def training_step(self, batch: TextImageBatch, batch_idx: int) -> Tensor:
        self.seen.append((batch["index"].tolist(), batch["caption"]))
        return (self.scale - batch["image"].mean()).square()

    def validation_step(self, batch: TextImageBatch, batch_idx: int) -> None:
        """Lightning asks for it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: TextImagePairs, saver: SaveAt, *, resume: bool = False) -> Recorder:
    module = Recorder()
    trainer = quiet_trainer(
        saver.path.parent,
        max_steps=10,
        use_distributed_sampler=False,
        limit_val_batches=0,
        callbacks=[] if resume else [saver],
    )
    trainer.fit(module, data, ckpt_path=saver.path if resume else None, weights_only=True)
    return module


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_resumed_within_an_epoch_equals_one_that_never_stopped(
    num_workers: int, tmp_path: Path, fill: Fill
) -> None:
    root = numbered_folder(fill, tmp_path / "data", 18)
    saver = SaveAt(tmp_path / "x.ckpt", step=6)
    whole = fit(small(root, caption_dropout=0.5), saver)
    data = small(root, caption_dropout=0.5, num_workers=num_workers)
    rest = fit(data, saver, resume=True)
    assert len(whole.seen) == 10
    assert rest.seen == whole.seen[6:]
    assert_close(rest.scale, whole.scale, rtol=0, atol=0)


def test_ranks_share_every_split(
    tmp_path: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = numbered_folder(fill, tmp_path, 18)
    shares: dict[str, list[list[int]]] = {"train": [], "val": [], "test": [], "predict": []}
    for rank in range(2):
        place = "datamodules.module_loaders.rank_and_world_size"
        monkeypatch.setattr(place, lambda trainer, rank=rank: (rank, 2))
        data = small(root, val_size=5, batch_size=3)
        for name, found in shares.items():
            loader = getattr(data, f"{name}_dataloader")()
            found.append([i for batch in loader for i in batch["index"].tolist()])
    for name, size in (("train", 12), ("val", 5), ("test", 5), ("predict", 5)):
        first, second = shares[name]
        assert not set(first) & set(second)
        assert len({*first, *second}) == len(first) + len(second) == size
    assert sorted([*shares["val"][0], *shares["val"][1]]) == list(range(5))


def test_held_out_pairs_are_never_trained_on(tmp_path: Path, fill: Fill) -> None:
    root = numbered_folder(fill, tmp_path, 18)
    for seed in (0, 1):
        data = small(root, val_size=6, batch_size=12, seed=seed, caption_dropout=0.0)
        train = levels(next(iter(data.train_dataloader()))["image"])
        held_out = levels(next(iter(data.val_dataloader()))["image"])
        assert sorted(train + held_out) == list(range(18))
        assert levels(next(iter(data.test_dataloader()))["image"]) == held_out
    assert data.stored_split("test") == data.stored_split("val") == "val"
    fingerprint = small(root, val_size=6).data_fingerprint
    assert data.data_fingerprint == data.fingerprint == fingerprint
    assert small(root, val_size=5).data_fingerprint != fingerprint
    assert small(root, val_size=6, image_size=9).data_fingerprint != fingerprint
    fill(root, {"pairs.jsonl": (root / "pairs.jsonl").read_bytes().replace(b"caption", b"Caption")})
    assert small(root, val_size=6).data_fingerprint != fingerprint


def latents(index: int) -> Tensor:
    return torch.randn(2, 3, generator=keyed_generator(index))


def store(
    folder: Path, data: TextImagePairs, split: str, count: int, identity: str = "tower"
) -> None:
    writer = TensorStoreWriter(folder, identity, split, count, data=data.data_fingerprint)
    index = torch.arange(count)
    writer.add(index, {"latents": torch.stack([latents(i) for i in index.tolist()])})
    writer.flush()


def test_stored_features_come_with_the_pairs(tmp_path: Path, fill: Fill) -> None:
    root = numbered_folder(fill, tmp_path / "data", 10)
    plain = small(root)
    store(tmp_path / "features", plain, "train", 8)
    store(tmp_path / "features", plain, "val", 2)
    for decode in (True, False):
        data = small(root, features=tmp_path / "features", decode=decode, num_workers=1)
        assert data.feature_identities == {"latents": "tower"}
        for loader in (data.train_dataloader(), data.test_dataloader()):
            for batch in loader:
                expected = torch.stack([latents(i) for i in batch["index"].tolist()])
                assert torch.equal(batch["features"]["latents"], expected)
                assert ("image" in batch) == decode


def test_features_that_do_not_fit_are_refused(tmp_path: Path, fill: Fill) -> None:
    root = numbered_folder(fill, tmp_path / "data", 10)
    folder = tmp_path / "features"
    folder.mkdir()
    with pytest.raises(DataError, match=r"no <identity>/index\.json; make the features first"):
        small(root, features=folder).setup("fit")
    store(folder, small(root), "train", 8)
    with pytest.raises(DataError, match="holds 0 of 0 samples of split val"):
        small(root, features=folder).setup("fit")
    with pytest.raises(DataError, match="tower: made of other data"):
        small(root, features=folder, image_size=9).train_dataloader()
    store(folder, small(root), "train", 8, identity="other")
    with pytest.raises(DataError, match="gives latents, as does"):
        small(root, features=folder).train_dataloader()


def test_pairs_without_features_are_skipped(tmp_path: Path, fill: Fill) -> None:
    root = numbered_folder(fill, tmp_path / "data", 10, n3=encoded(3))
    data = small(root)
    writer = TensorStoreWriter(tmp_path / "f", "tower", "train", 8, data=data.data_fingerprint)
    index = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    writer.add(index, {"latents": torch.stack([latents(i) for i in index.tolist()])})
    writer.flush()
    with pytest.raises(DataError, match="tower: holds 7 of 8 samples of split train"):
        small(root, features=tmp_path / "f").train_dataloader()
    lenient = small(root, features=tmp_path / "f", on_error="skip", max_skipped_share=0.2)
    with pytest.warns(UserWarning, match="skipped .*nothing stored of it in"):
        batches = list(lenient.train_dataloader())
    found = torch.cat([batch["index"] for batch in batches]).sort().values.tolist()
    assert found == [0, 1, 2, 4, 4, 5, 6, 7]
