"""Damaged, foreign and hostile files among stored features are refused, in one line each."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.errors import DataError
from datamodules.feature_shards import shard_path
from datamodules.token_features import TokenFeatures
from tests.datamodules.stored_features import ORIGIN, cache, features, same, write

__all__ = ["cache"]


def _rewrite(path: Path, **changes: Any) -> None:  # noqa: ANN401
    """Write a shard anew with other tensors, metadata or neither (None)."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    contents = {**load_file(path), **metadata, **changes}
    tensors = {k: v for k, v in contents.items() if isinstance(v, Tensor)}
    save_file(tensors, path, {k: v for k, v in contents.items() if isinstance(v, str)})


class _Evil:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _outside(path: Path) -> None:
    target = path.parents[2] / "elsewhere.safetensors"
    path.rename(target)
    path.symlink_to(target)


HALVED = features(range(13))["tokens"][:, :, :4].contiguous()
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "incomplete or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "incomplete or damaged"),
    "text": (lambda path: path.write_text("tokens"), "incomplete or damaged"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(_Evil())), "incomplete or damaged"),
    "huge header": (lambda p: p.write_bytes(b"\xff" * 7 + b"\x00{}"), "incomplete or damaged"),
    "broken link": (lambda p: (p.unlink(), p.symlink_to(p.parent / "x")), "incomplete or damaged"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "incomplete or damaged"),
    "other file": (lambda path: save_file({"a": torch.ones(2)}, path), "holds no features of ver"),
    "later version": (lambda path: _rewrite(path, version="2"), "holds no features of version 1"),
    "no encoder": (lambda path: _rewrite(path, encoder=None), "its encoder is missing or cannot"),
    "odd layer": (lambda path: _rewrite(path, layer='"2"'), "its layer is missing or cannot be"),
    "odd grid": (lambda path: _rewrite(path, grid="[2, true]"), "its grid is missing or cannot"),
    "deep names": (lambda path: _rewrite(path, kind_names="[" * 9999), "its kind_names is missing"),
    "odd size": (lambda path: _rewrite(path, num_images="many"), "its num_images cannot be read"),
    "no labels": (lambda path: _rewrite(path, kind=None), "tensors missing or unknown: kind"),
    "no attention": (lambda path: _rewrite(path, cls_attention=None), "unknown: cls_attention"),
    "more": (lambda path: _rewrite(path, b=torch.ones(2)), "tensors missing or unknown: b"),
    "other grid": (
        lambda path: _rewrite(path, grid="[3, 3]"),
        "of shape (13, 6), not (13, 9)",
    ),
    "other type": (lambda path: _rewrite(path, tokens=HALVED.float()), "tokens is F32 of shape"),
    "fewer rows": (lambda path: _rewrite(path, tokens=HALVED[:9]), "(9, 6, 4), not (13, 6"),
    "other width": (lambda path: _rewrite(path, tokens=HALVED), "made with channels="),
    "other encoder": (lambda path: _rewrite(path, encoder='"a"'), "made with encoder="),
    "other split size": (lambda path: _rewrite(path, num_images="27"), "made with num_images="),
    "negative": (lambda p: _rewrite(p, index=torch.arange(-1, 12)), "image -1 of 26"),
    "double": (lambda path: _rewrite(path, index=torch.arange(4, 17)), "is in"),
    "misplaced": (lambda path: _rewrite(path, split="val"), "holds images of split val; move it"),
    "outside": (_outside, "leads out of"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_wrong_shard_is_named_with_the_remedy(
    case: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache)
    spoil, expected = FAULTS[case]
    spoil(shard_path(cache, "train", 0, 0))
    with pytest.raises(DataError) as caught:
        TokenFeatures(cache).setup("fit")
    message = str(caught.value)
    assert expected in message
    assert str(cache / "train" / "features-rank") in message
    assert any(remedy in message for remedy in ("remove ", "move it", "copy the file"))
    assert len(message.splitlines()) == 1
    assert not (cache / "executed").exists()


def test_splits_of_two_encoders_are_refused(cache: Path) -> None:
    write(cache, range(3), split="test", origin=replace(ORIGIN, layer=1))
    with pytest.raises(DataError, match=r"test/.*: made with layer=1, but .*/train/.* with 2; rem"):
        TokenFeatures(cache).setup("fit")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", ["tokens", "item_token", "kind"])
def test_a_changed_byte_is_noticed_when_it_is_read(
    name: str, num_workers: int, cache: Path
) -> None:
    path = shard_path(cache, "train", 0, 0)
    tensor = load_file(path)[name].clone()
    tensor.view(13, -1).view(torch.uint8)[5, 0] ^= 1  # of image 18
    _rewrite(path, **{name: tensor})
    data = TokenFeatures(cache, batch_size=26, num_workers=num_workers)
    expected = rf"{path.name}: what it holds of image 18 is damaged; remove it and run"
    with pytest.raises(DataError, match=expected):
        list(data.train_dataloader())
    unchecked = TokenFeatures(cache, batch_size=26, verify=False)
    assert len(list(unchecked.train_dataloader())) == 1


def test_a_shard_that_vanishes_is_named(cache: Path) -> None:
    loader = TokenFeatures(cache).train_eval_dataloader()
    shard_path(cache, "train", 0, 0).unlink()
    with pytest.raises(DataError, match=r"features-rank0-00000.safetensors: can no longer be read"):
        list(loader)


def test_random_damage_never_passes_unnoticed(cache: Path) -> None:
    path = shard_path(cache, "train", 0, 0)
    sound, whole = path.read_bytes(), list(TokenFeatures(cache).train_eval_dataloader())
    chance, messages = random.Random(0), list[str]()  # noqa: S311
    for _ in range(60):
        content = bytearray(sound)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            batches = list(TokenFeatures(cache).train_eval_dataloader())
        except DataError as error:
            messages.append(str(error))
        else:  # in a name or in padding
            assert all(same(a, b) for a, b in zip(batches, whole, strict=True))
    assert len(messages) > 50
    assert all(str(path) in message for message in messages)
