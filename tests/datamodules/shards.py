"""Small WebDataset shards, for tests of their reader."""

from __future__ import annotations

from pathlib import Path

from datamodules.errors import FaultPolicy
from datamodules.readers.protocol import Split
from datamodules.readers.webdataset import ShardReader, open_webdataset
from tests.datamodules.fixture_types import MakeImage


def open_shards(root: Path, on_error: str = "raise") -> dict[Split, ShardReader]:
    policy = FaultPolicy("skip" if on_error == "skip" else "raise", 0.3)
    return open_webdataset(root, policy)


def samples(make_image: MakeImage, first: int, count: int) -> dict[str, bytes]:
    """Members of a shard: images of the levels ``first`` and on, with their class modulo 3."""
    members = {}
    for number in range(first, first + count):
        members[f"{number:06d}.png"] = make_image(number)
        members[f"{number:06d}.cls"] = str(number % 3).encode()
    return members
