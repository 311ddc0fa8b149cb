"""Tar shards of every data module: members that lead elsewhere or claim too much are refused."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.documents import DocumentsAndPhotographs
from datamodules.errors import DataError
from datamodules.imagenet import ImageNetPixels
from datamodules.text_image.text_image import TextImagePairs
from tests.datamodules.caption_roots import encoded


def labelled(root: Path) -> None:
    """Images with classes."""
    ImageNetPixels(root, image_size=8, channels=3, batch_size=2, val_size=1).setup("fit")


def plain(root: Path) -> None:
    """Images alone."""
    DocumentsAndPhotographs(
        root, format="webdataset", image_size=8, patch_size=4, batch_size=2, val_size=1
    ).setup("fit")


def captioned(root: Path) -> None:
    """Images with captions."""
    TextImagePairs(root, image_size=8, batch_size=2, val_size=1).setup("fit")


def named(name: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(name)


def link(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("9.png")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def huge(kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo("9.png")
    info.type, info.size = kind, 10 * 2**30
    return info


HOSTILE = {
    "../": named("../../9.png"),
    "absolute": named("/absolute/9.png"),
    "symbolic link": link(tarfile.SYMTYPE),
    "hard link": link(tarfile.LNKTYPE),
    "device": link(tarfile.CHRTYPE),
    "ten gigabytes": huge(),
    "an extended header of ten gigabytes": huge(tarfile.XHDTYPE),
}


@pytest.mark.parametrize("member", HOSTILE)
@pytest.mark.parametrize("reader", [labelled, plain, captioned])
def test_member_is_refused(reader: Callable[[Path], None], member: str, tmp_path: Path) -> None:
    shard = tmp_path / "in/train-000.tar"
    shard.parent.mkdir()
    with shard.open("wb") as stream:
        for number in range(6):
            for name, data in {"png": encoded(number), "cls": b"0", "txt": b"caption"}.items():
                info = tarfile.TarInfo(f"{number}.{name}")
                info.size = len(data)
                stream.write(info.tobuf() + data + bytes(-len(data) % 512))
        stream.write(HOSTILE[member].tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"train-000\.tar") as caught:
        reader(tmp_path / "in")
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
