"""Tensors stored by sample: written once, resumed, read at random, refused when damaged."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.errors import DataError
from datamodules.keyed_random import keyed_generator
from datamodules.tensor_store import TensorStore, TensorStoreWriter


def rows(indices: Tensor) -> dict[str, Tensor]:
    """Tensors of samples, each a pure function of its index."""
    latents = [torch.randn(4, 3, generator=keyed_generator(i)) for i in indices.tolist()]
    return {
        "latents": torch.stack(latents),
        "vae": torch.stack(latents)[:, :2].to(torch.bfloat16),
        "length": indices.clone(),
    }


def writer(
    folder: Path,
    split: str = "train",
    count: int = 10,
    *,
    data: str = "d0",
    rank: int = 0,
    shard_bytes: int = 1,
) -> TensorStoreWriter:
    return TensorStoreWriter(
        folder, "abc", split, count, data=data, rank=rank, shard_bytes=shard_bytes
    )


def fill_split(folder: Path, split: str = "train", count: int = 10, shard_bytes: int = 1) -> Path:
    store = writer(folder, split, count, shard_bytes=shard_bytes)
    order = torch.randperm(count, generator=keyed_generator(1))
    for part in order.split(4):
        store.add(part, rows(part))
    store.flush()
    return folder / "abc"


def test_rows_are_read_back_at_random(tmp_path: Path) -> None:
    store = TensorStore(fill_split(tmp_path), "train")
    assert len(store) == 10
    wanted = torch.tensor([7, 0, 7, 9])
    for found in (store.rows(wanted), pickle.loads(pickle.dumps(store)).rows(wanted)):  # noqa: S301
        for name, expected in rows(wanted).items():
            assert found[name].dtype == expected.dtype
            assert torch.equal(found[name], expected)
    found["latents"].zero_()  # a copy: the files are as before
    assert torch.equal(store.rows(wanted)["latents"], rows(wanted)["latents"])


def test_shards_close_at_a_size(tmp_path: Path) -> None:
    def shards(folder: Path) -> int:
        return len(list(folder.glob("abc/train/shard-*")))

    fill_split(tmp_path / "a")
    assert shards(tmp_path / "a") == 3
    fill_split(tmp_path / "b", shard_bytes=8 * (4 * 3 * 4 + 2 * 3 * 2 + 8))
    assert shards(tmp_path / "b") == 2
    fill_split(tmp_path / "c", shard_bytes=2**20)
    assert shards(tmp_path / "c") == 1


def test_splits_are_added_to_one_store(tmp_path: Path) -> None:
    fill_split(tmp_path)
    folder = fill_split(tmp_path, "test", 3)
    assert len(TensorStore(folder, "train")) == 10
    assert torch.equal(
        TensorStore(folder, "test").rows(torch.tensor([2]))["length"], torch.tensor([2])
    )
    assert len(TensorStore(folder, "val")) == 0


def test_a_stopped_call_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    first = writer(tmp_path, shard_bytes=130)
    first.add(torch.tensor([3, 5]), rows(torch.tensor([3, 5])))
    first.add(torch.tensor([1]), rows(torch.tensor([1])))  # waits, and is lost
    assert first.missing.tolist() == [0, 2, 4, 6, 7, 8, 9]
    again = writer(tmp_path, rank=1)
    assert again.missing.tolist() == [0, 1, 2, 4, 6, 7, 8, 9]
    changed = {name: tensor + 1 for name, tensor in rows(torch.tensor([5, 1, 1])).items()}
    again.add(torch.tensor([5, 1, 1]), changed)  # 5 is stored, and 1 comes twice
    again.add(again.missing, rows(again.missing))
    store = TensorStore(tmp_path / "abc", "train")
    assert len(store) == 10
    assert torch.equal(store.rows(torch.tensor([5]))["latents"], rows(torch.tensor([5]))["latents"])
    assert sorted(path.name for path in (tmp_path / "abc/train").iterdir()) == [
        "shard-rank0-00000.safetensors",
        "shard-rank1-00000.safetensors",
        "shard-rank1-00001.safetensors",
    ]
    assert not writer(tmp_path).missing.numel()


def test_samples_that_are_not_stored(tmp_path: Path) -> None:
    part = writer(tmp_path)
    part.add(torch.tensor([2]), rows(torch.tensor([2])))
    store = TensorStore(tmp_path / "abc", "train")
    assert [index in store for index in (-1, 1, 2, 10)] == [False, False, True, False]
    assert store.stored.tolist() == [2]
    with pytest.raises(DataError, match="sample 4 of split train is not stored; run the command"):
        store.rows(torch.tensor([2, 4]))


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    one = torch.tensor([1])
    for name in ("../abc", "", "a/b", ".hidden", "x" * 200):
        with pytest.raises(ValueError, match=r"identity=.*: expected up to 128 of"):
            TensorStoreWriter(tmp_path, name, "train", 3, data="d")
    store = writer(tmp_path)
    for tensors, message in (
        ({"x": torch.zeros(2, 3)}, r"x: torch.float32 \(2, 3\) for 1 samples"),
        ({"x": torch.zeros(1, dtype=torch.complex64)}, r"x: torch\.complex64"),
        ({"index": torch.zeros(1)}, r"index: .*not called index"),
    ):
        with pytest.raises(ValueError, match=message):
            store.add(one, tensors)
    with pytest.raises(ValueError, match="index 10: split train has 10 samples"):
        store.add(torch.tensor([10]), rows(one))
    store.add(one, rows(one))
    with pytest.raises(ValueError, match="give what makes other tensors another identity"):
        store.add(torch.tensor([2]), {"latents": torch.zeros(1, 5)})
    for options in ({"data": "d1"}, {"count": 11}):
        with pytest.raises(DataError, match="made of other samples"):
            writer(tmp_path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"{broken", "no index of stored tensors"),
        ({"version": 9}, "not version 1"),
        ({"tensors": {"latents": {"shape": [4, 3], "dtype": "object"}}}, "of type 'object'"),
        ({"tensors": {"latents": {"shape": [-1], "dtype": "float32"}}}, "-1 is no count"),
        ({"tensors": {"latents": {"shape": [2**39], "dtype": "float32"}}}, "of shape"),
        ({"tensors": []}, "no index of stored tensors"),
        ({"splits": {"train": 3}}, r"samples \d .. \d of 3"),
        ({"identity": "other"}, "its index.json is of other"),
    ],
)
def test_a_damaged_index(change: bytes | dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = fill_split(tmp_path)
    path = folder / "index.json"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message) as caught:
        TensorStore(folder, "train")
    assert "\n" not in str(caught.value)


def test_damaged_shards(tmp_path: Path) -> None:
    folder = fill_split(tmp_path)
    first, second, _ = sorted((folder / "train").iterdir())
    content = second.read_bytes()
    tensors = load_file(second)
    changes: list[tuple[Any, str]] = [
        (content[: len(content) // 2], "incomplete or damaged"),
        (b"junk", "incomplete or damaged"),
        (first.read_bytes(), "holds a sample that is stored already"),
        ({**tensors, "index": tensors["index"].float()}, "its index is torch.float32"),
        ({**tensors, "vae": tensors["vae"].float()}, "vae is torch.float32"),
        ({**tensors, "vae": tensors["vae"][:, :1].clone()}, r"vae is torch.bfloat16 \(4, 1, 3\)"),
        ({"index": tensors["index"]}, "holds index;"),
        ({**tensors, "index": torch.full((4,), 3)}, "holds a sample that is stored already"),
        ({**tensors, "index": tensors["index"] - 20}, r"samples -\d+ .. -\d+ of 10"),
    ]
    for change, message in changes:
        if isinstance(change, bytes):
            second.write_bytes(change)
        else:
            save_file(change, second)
        with pytest.raises(DataError, match=message) as caught:
            TensorStore(folder, "train")
        assert str(caught.value).startswith(str(second))
        assert "\n" not in str(caught.value)
    second.unlink()
    second.symlink_to("/etc/hostname")
    with pytest.raises(DataError, match="leads out of"):
        TensorStore(folder, "train")


def test_a_shard_that_vanishes(tmp_path: Path) -> None:
    folder = fill_split(tmp_path)
    store = TensorStore(folder, "train")
    for path in (folder / "train").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="can no longer be read"):
        store.rows(torch.tensor([1]))
