"""Tables of contents of .torch files, and files that are damaged or hostile."""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.errors import DataError
from datamodules.multiview.readers.torch_contents import read_array, read_contents
from datamodules.multiview.readers.torch_scenes import open_chunks
from tests.datamodules.scene_roots import stored_scene


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float64])
def test_tensors_of_every_type_and_their_slices_are_found(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = torch.arange(24).to(dtype).view(2, 3, 4)
    saved = {"whole": whole, "part": whole[1], "rows": whole[1, 1:], "none": whole[:0]}
    saved |= {"number": whole[1, 2, 3], "twice": whole}
    torch.save(saved, tmp_path / "x.torch")
    found = read_contents(tmp_path / "x.torch")
    with (tmp_path / "x.torch").open("rb") as stream:
        for name, tensor in saved.items():
            values = read_array(stream.fileno(), found[name])
            assert values.dtype == tensor.numpy().dtype
            np.testing.assert_array_equal(values, tensor.numpy())


@pytest.mark.parametrize("tensor", [torch.zeros(4, 3).t(), torch.zeros(8)[::2]])
def test_tensors_with_gaps_are_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save([tensor], tmp_path / "x.torch")
    with pytest.raises(DataError, match=r"x\.torch: holds a tensor that is not contiguous"):
        read_contents(tmp_path / "x.torch")


class Payload:
    """Creates a folder when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["in a scene", "instead of the chunk", "as an image"])
def test_pickled_objects_are_refused_and_not_run(place: str, tmp_path: Path) -> None:
    payload = Payload(tmp_path / "marker")
    scene: Any = stored_scene("a")
    if place == "in a scene":
        scene["url"] = payload
    elif place == "as an image":
        scene["images"][0] = payload
    torch.save(payload if place == "instead of the chunk" else [scene], tmp_path / "0.torch")
    with pytest.raises(DataError, match=r"0\.torch: holds posix\.mkdir, and is not opened: only"):
        open_chunks(tmp_path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "saved",
    [collections.Counter("a"), np.zeros(3), torch.nn.Linear(1, 1), Path("x"), torch.float32],
    ids=lambda saved: type(saved).__name__,
)
def test_even_harmless_objects_are_refused(saved: object, tmp_path: Path) -> None:
    torch.save([{"key": saved}], tmp_path / "0.torch")
    with pytest.raises(DataError, match=r"0\.torch: holds .*and is not opened"):
        read_contents(tmp_path / "0.torch")


def forged(file: Path, pickled: bytes) -> Path:
    """A .torch file with a pickle of one's own, and one record of eight bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", bytes(8))
    return file


def tensor_pickle(count: int, start: int, size: int, stride: int = 1) -> bytes:
    """A pickle that claims a storage of ``count`` floats and a tensor of ``size`` in it."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=2)
    pickler.persistent_id = lambda item: item.pid if isinstance(item, Storage) else None  # type: ignore[method-assign]
    pickler.dump(Tensor(Storage(count), start, size, stride))
    return stream.getvalue()


class Storage:
    def __init__(self, count: int) -> None:
        self.pid = ("storage", torch.FloatStorage, "0", "cpu", count)


class Tensor:
    def __init__(self, *claims: Any) -> None:  # noqa: ANN401
        self.claims = claims

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        storage, start, size, stride = self.claims
        hooks: dict[str, Any] = collections.OrderedDict()
        arguments = (storage, start, (size,), (stride,), False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ((3, 0, 2), "a storage of 3 values in 8 bytes"),
        ((-1, 0, 0), "a storage of -1 values"),
        ((2, 0, 3), "larger than its storage"),
        ((2, 1, 2), "larger than its storage"),
        ((2, -1, 2), "larger than its storage"),
        ((2, 0, -2), "not contiguous"),
        ((2, 0, 2, 0), "not contiguous"),
    ],
)
def test_tensors_never_reach_beyond_their_record(
    claims: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read_contents(forged(tmp_path / "x.torch", tensor_pickle(*claims)))
    assert read_contents(forged(tmp_path / "y.torch", tensor_pickle(2, 0, 2))).shape == (2,)


def test_a_missing_record_is_damage(tmp_path: Path) -> None:
    pickled = tensor_pickle(2, 0, 2).replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007")
    with pytest.raises(DataError, match=r"x\.torch: damaged"):
        read_contents(forged(tmp_path / "x.torch", pickled))


def test_files_in_the_old_format_are_named(tmp_path: Path) -> None:
    torch.save([stored_scene("a")], tmp_path / "0.torch", _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"0\.torch: .*not written by torch\.save in its zip"):
        open_chunks(tmp_path)
