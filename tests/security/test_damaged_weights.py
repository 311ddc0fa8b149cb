"""Files of weights with wrong bytes at random places: refused in one line, by every reader."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_modules.cli.checkpoint_files import read_checkpoint
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.farmer_distillation import load_teacher
from models.clift.checkpoint import read_checkpoint as read_clift
from models.concerto.checkpoint_files import read_file as read_concerto
from models.farmer.checkpoint import read_tarflow
from models.image_encoders.encoder_files import read_weights
from models.layers.vgg19 import read_vgg19


def read_encoder(path: Path) -> object:
    """As the encoders of images read their weights."""
    return read_weights(path, "save it there")


READERS: list[Callable[[Path], object]] = [
    read_checkpoint,
    load_teacher,
    read_tarflow,
    read_clift,
    read_concerto,
    read_encoder,
    read_vgg19,
]


def originals(folder: Path) -> list[bytes]:
    """One state dict as torch writes it, as torch wrote it before 1.6, and as Python does."""
    state = {"a": torch.zeros(3), "b": [1, 2, {"c": "x"}]}
    torch.save(state, folder / "new.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    plain = pickle.dumps({"a": [1, 2.5, "x", None, (1, 2)]}, protocol=2)
    return [(folder / "new.pth").read_bytes(), (folder / "old.pth").read_bytes(), plain]


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content with up to five other bytes, half of the time with its end cut off."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 2, 5))):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed[: chance.choice((len(changed), chance.randrange(len(changed))))])


@pytest.mark.parametrize("reader", READERS)
def test_wrong_bytes(reader: Callable[[Path], object], tmp_path: Path) -> None:
    chance = random.Random(0)  # noqa: S311 - reproducible, not secret
    file = tmp_path / "damaged.pth"
    refusals = []
    for content in originals(tmp_path) * 60:
        file.write_bytes(damaged(content, chance))
        try:
            reader(file)
        except (ValueError, CheckpointError) as error:
            refusals.append(str(error))
    assert len(refusals) > 90
    assert all(str(file) in refusal for refusal in refusals)
