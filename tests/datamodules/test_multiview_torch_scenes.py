"""Scenes in .torch files, read without being loaded."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.errors import DataError, SampleError
from datamodules.multiview.readers.detection import detect, open_splits
from datamodules.multiview.readers.torch_scenes import open_chunks, open_single
from tests.datamodules.scene_roots import FOCAL, picture, pose, stored_scene, write_chunks


def test_chunks_give_cameras_and_images(tmp_path: Path) -> None:
    reader = open_chunks(write_chunks(tmp_path, {"a": 3, "b": 5, "c": 4}))
    assert reader.names == ("a", "b", "c")
    assert [reader.num_frames(place) for place in range(3)] == [3, 5, 4]
    for scene, frames in enumerate((3, 5, 4)):
        cameras = reader.cameras(scene)
        np.testing.assert_allclose(cameras.pose, [pose(f) for f in range(frames)], atol=1e-6)
        np.testing.assert_allclose(cameras.intrinsics, [FOCAL] * frames, atol=1e-6)
        assert not cameras.distortion.any()
        assert [reader.image(scene, f) for f in range(frames)] == [
            picture(scene, f) for f in range(frames)
        ]
    assert reader.frame_id(1, 4).endswith("000000.torch: scene b: frame 4")


def test_one_file_for_each_scene(tmp_path: Path) -> None:
    for scene, name in enumerate(("x", "y")):
        torch.save(stored_scene("other key", scene), tmp_path / f"{name}.torch")
    reader = open_single(tmp_path)
    assert reader.names == ("x", "y")
    assert reader.image(1, 2) == picture(1, 2)


def test_chunks_without_an_index_are_listed(tmp_path: Path) -> None:
    (write_chunks(tmp_path, {"a": 3, "b": 5, "c": 4}) / "index.json").unlink()
    reader = open_chunks(tmp_path)
    assert reader.names == ("a", "b", "c")
    assert reader.num_frames(2) == 4


def test_layouts_are_found_out(tmp_path: Path) -> None:
    write_chunks(tmp_path / "chunks/train", {"a": 3})
    (write_chunks(tmp_path / "bare", {"a": 3}) / "index.json").unlink()
    (tmp_path / "scenes/test").mkdir(parents=True)
    torch.save(stored_scene("a"), tmp_path / "scenes/test/a.torch")
    found = {name: detect(tmp_path / name) for name in ("chunks", "bare", "scenes")}
    assert found == {"chunks": "re10k", "bare": "re10k", "scenes": "scenes"}
    splits = {name: set(open_splits(tmp_path / name, found[name])) for name in found}
    assert splits == {"chunks": {"train"}, "bare": {"all"}, "scenes": {"test"}}


def test_only_the_images_asked_for_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = stored_scene("a", frames=40)
    scene["images"] = [torch.zeros(50_000, dtype=torch.uint8) for _ in range(40)]
    torch.save([scene], tmp_path / "0.torch")
    reader = open_chunks(tmp_path)
    read = 0
    original = os.pread

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        nonlocal read
        read += count
        return original(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", counted)
    assert len(reader.image(0, 7)) == 50_000
    assert 50_000 <= read < 51_000


def test_a_pickled_reader_forgets_what_it_opened(tmp_path: Path) -> None:
    reader = open_chunks(write_chunks(tmp_path, {"a": 60, "b": 60}))
    reader.num_frames(0)
    data = pickle.dumps(reader)
    assert len(data) < 1000
    assert pickle.loads(data).image(1, 3) == picture(1, 3)  # noqa: S301


def test_the_fingerprint_changes_with_the_data(tmp_path: Path) -> None:
    one = open_chunks(write_chunks(tmp_path / "one", {"a": 3, "b": 3})).fingerprint
    assert open_chunks(write_chunks(tmp_path / "two", {"a": 3, "b": 3})).fingerprint == one
    assert open_chunks(write_chunks(tmp_path / "three", {"a": 3, "b": 4})).fingerprint != one


def test_a_cut_off_chunk_is_named_when_its_scene_is_read(tmp_path: Path) -> None:
    write_chunks(tmp_path, {"a": 3, "b": 3, "c": 3})
    chunk = tmp_path / "000000.torch"
    chunk.write_bytes(chunk.read_bytes()[:-100])
    reader = open_chunks(tmp_path)
    with pytest.raises(SampleError, match=r"000000\.torch: damaged, cut off or not .*fetch it"):
        reader.num_frames(0)
    assert reader.num_frames(2) == 3


def bad_scene(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return {**stored_scene("a"), **changes}


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (bad_scene(cameras=torch.zeros(6, 17)), r"scene a: cameras must be a tensor \(F, 18\)"),
        (bad_scene(cameras=[1]), r"scene a: cameras must be a tensor"),
        (bad_scene(images=[]), "scene a: 0 images for 6 cameras"),
        (bad_scene(images=[torch.zeros(2, 2)]), "images must be a list of 1-D uint8"),
        (bad_scene(key=5), "scene key 5 is no text"),
    ],
)
def test_chunks_of_another_form_are_named(
    scene: dict[str, Any], message: str, tmp_path: Path
) -> None:
    torch.save([scene], tmp_path / "0.torch")
    with pytest.raises(DataError, match=message):
        open_chunks(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows[2, 6:].zero_(), "camera matrix without inverse|no rotation"),
        (lambda rows: rows[2, 6:].mul_(2), "frame 2 has a pose that is no rotation"),
        (lambda rows: rows[3, 0].zero_(), "frame 3 has a focal length that is not positive"),
        (lambda rows: rows[4, 2].fill_(float("nan")), "frame 4 has a camera that is not finite"),
    ],
)
def test_unusable_cameras_are_named(
    spoil: Callable[[torch.Tensor], None], message: str, tmp_path: Path
) -> None:
    scene = stored_scene("a")
    spoil(scene["cameras"])
    torch.save([scene], tmp_path / "0.torch")
    with pytest.raises(SampleError, match=message):
        open_chunks(tmp_path).cameras(0)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": "../000000.torch"}, r"'\.\./000000\.torch' is no plain file name"),
        ({"a": "/etc/passwd"}, "is no plain file name"),
        ({"a": "000009.torch"}, r"names 1 files that are not in the folder: 000009\.torch"),
        ({"a": 3}, "expected {scene: chunk file}"),
        ([1], "expected {scene: chunk file}"),
    ],
)
def test_an_index_that_does_not_match_is_named(
    index: Any,  # noqa: ANN401
    message: str,
    tmp_path: Path,
) -> None:
    (write_chunks(tmp_path, {"a": 3}) / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=message):
        open_chunks(tmp_path)


def test_a_scene_that_is_not_in_its_chunk_is_named(tmp_path: Path) -> None:
    index = write_chunks(tmp_path, {"a": 3}) / "index.json"
    index.write_text(json.dumps({"a": "000000.torch", "z": "000000.torch"}))
    with pytest.raises(SampleError, match=r"000000\.torch: scene z is not in the file, though"):
        open_chunks(tmp_path).num_frames(1)


def test_a_scene_in_two_chunks_is_named(tmp_path: Path) -> None:
    for name in ("0", "1"):
        torch.save([stored_scene("a")], tmp_path / f"{name}.torch")
    with pytest.raises(DataError, match=r"scene a is in 0\.torch and in 1\.torch"):
        open_chunks(tmp_path)


def test_chunks_and_single_scenes_are_not_mixed_up(tmp_path: Path) -> None:
    torch.save([stored_scene("a")], tmp_path / "a.torch")
    with pytest.raises(SampleError, match=r"holds no single scene; set .*format to re10k"):
        open_single(tmp_path).num_frames(0)
    torch.save(stored_scene("a"), tmp_path / "a.torch")
    with pytest.raises(DataError, match=r"holds no list of scenes; .*format to scenes"):
        open_chunks(tmp_path)
