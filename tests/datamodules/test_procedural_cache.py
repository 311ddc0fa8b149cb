"""The cache of procedural scenes: RE10K layout, exactness, and no half-written cache, ever."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.errors import DataError
from datamodules.multiview import procedural, procedural_chunks
from datamodules.multiview.procedural import MARKER, ensure_procedural
from datamodules.multiview.procedural_render import render_views
from datamodules.multiview.procedural_scene import sample_scenes
from datamodules.multiview.procedural_textures import build_atlas, tile_texels

SIZE = 16
COUNTS = {"train": 3, "test": 2}


def _make(root: Path, seed: int = 0) -> Path:
    return ensure_procedural(root, SIZE, COUNTS["train"], COUNTS["test"], seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("procedural"))


def _files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _scenes(folder: Path, split: str) -> list[dict[str, Any]]:
    index = json.loads((folder / split / "index.json").read_text())
    chunks = {name: torch.load(folder / split / name, weights_only=True) for name in index.values()}
    return [scene for chunk in chunks.values() for scene in chunk]


def _picture(data: torch.Tensor) -> Image.Image:
    return Image.open(io.BytesIO(data.numpy().tobytes()))


@pytest.mark.parametrize("split", ["train", "test"])
def test_chunks_hold_the_fields_of_re10k_and_are_read_without_pickle(
    made: Path, split: str
) -> None:
    scenes = _scenes(made, split)
    index = json.loads((made / split / "index.json").read_text())
    assert [scene["key"] for scene in scenes] == list(index)
    assert len(scenes) == COUNTS[split]
    for scene in scenes:
        assert set(scene) == {"url", "timestamps", "cameras", "images", "key"}
        assert scene["url"] == "procedural"
        assert scene["timestamps"].tolist() == list(range(14))
        assert scene["cameras"].shape == (14, 18)
        assert scene["cameras"].dtype == torch.float32
        assert len(scene["images"]) == 14
        for data in scene["images"]:
            assert (data.dtype, data.ndim) == (torch.uint8, 1)
            # A view of a larger buffer would be written whole.
            assert data.untyped_storage().nbytes() == data.numel()
            assert (_picture(data).format, _picture(data).size) == ("JPEG", (SIZE, SIZE))


def test_cameras_are_the_exact_poses_as_world_to_camera(made: Path) -> None:
    _, poses = sample_scenes(0, "test", range(COUNTS["test"]))
    for scene, exact in zip(_scenes(made, "test"), poses, strict=True):
        rows = scene["cameras"]
        expected = torch.tensor([0.8, 0.8, 0.5, 0.5, 0.0, 0.0]).expand(14, 6)
        assert torch.equal(rows[:, :6], expected)
        world_to_camera = rows[:, 6:].reshape(14, 3, 4)
        identity = world_to_camera @ exact
        assert torch.allclose(identity, torch.eye(4)[:3].expand(14, 3, 4), atol=1e-6)


def test_pictures_stay_within_46_db_of_the_exact_render(tmp_path: Path) -> None:
    folder = ensure_procedural(tmp_path, 32, 1, 1)
    scenes, poses = sample_scenes(0, "test", [0])
    exact = render_views(scenes, poses, build_atlas("test", 0, tile_texels(32)), 32)[0]
    for data, picture in zip(_scenes(folder, "test")[0]["images"], exact, strict=True):
        stored = torch.from_numpy(np.asarray(_picture(data)).copy()).permute(2, 0, 1) / 255
        assert -10 * torch.log10((stored - picture).square().mean()) > 46


def test_the_evaluation_index_names_the_test_scenes(made: Path) -> None:
    entries = json.loads((made / "evaluation_index.json").read_text())
    assert list(entries) == [scene["key"] for scene in _scenes(made, "test")]
    expected = {"context": [0, 2, 4, 6], "target": [8, 9, 10, 11, 12, 13]}
    assert all(entry == expected for entry in entries.values())


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    made: Path, tmp_path: Path
) -> None:
    again, other = _make(tmp_path), _make(tmp_path, seed=1)
    assert _files(again) == _files(made)
    assert other != again
    assert _files(other)["train/000000.torch"] != _files(again)["train/000000.torch"]


def test_scenes_do_not_depend_on_their_number_or_the_chunk_size(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(procedural_chunks, "SCENES_PER_CHUNK", 2)
    more = ensure_procedural(tmp_path, SIZE, 5, 1)
    assert sorted(path.name for path in (more / "train").glob("*.torch")) == [
        "000000.torch",
        "000001.torch",
        "000002.torch",
    ]
    for few, many in zip(_scenes(made, "train"), _scenes(more, "train"), strict=False):
        assert few["key"] == many["key"]
        assert torch.equal(few["cameras"], many["cameras"])
        assert all(map(torch.equal, few["images"], many["images"]))


def test_a_finished_cache_is_used_as_it_is(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procedural, "write_layout", None)
    assert _make(made.parent) == made


def test_an_interrupted_writer_leaves_nothing_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(procedural_chunks, "camera_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            _make(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert (_make(tmp_path) / MARKER).is_file()


@pytest.mark.parametrize("damage", ["cut", "missing", "marker"])
def test_a_damaged_cache_is_made_again(made: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / made.name
    shutil.copytree(made, folder)
    chunk = folder / "train" / "000000.torch"
    if damage == "cut":
        chunk.write_bytes(chunk.read_bytes()[:-1000])
    elif damage == "missing":
        chunk.unlink()
    else:
        (folder / MARKER).unlink()
    with pytest.warns(UserWarning, match=r"damaged; its scenes were made again"):
        assert _make(tmp_path) == folder
    assert _files(folder) == _files(made)


_WRITER = """
import sys
from pathlib import Path
from datamodules.multiview import procedural, procedural_chunks
write, encode = procedural.write_layout, procedural_chunks.encode_scene
def counted(*arguments):
    print("writes", flush=True)
    return write(*arguments)
def slow(*arguments):
    import time
    time.sleep(float(sys.argv[2]))
    return encode(*arguments)
procedural.write_layout, procedural_chunks.encode_scene = counted, slow
print(procedural.ensure_procedural(Path(sys.argv[1]), 16, 3, 2), flush=True)
"""


def _start_writer(root: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WRITER, str(root), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_second_process_waits_for_the_first_and_uses_its_cache(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = _start_writer(tmp_path, 0.3)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writes\n"
    monkeypatch.setattr(procedural, "write_layout", None)
    folder = _make(tmp_path)
    assert writer.communicate(timeout=60)[0] == f"{folder}\n"
    assert writer.returncode == 0
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]
    assert _files(folder) == _files(made)


def test_without_file_locks_the_first_to_finish_wins(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(_make, [tmp_path] * 2))
    assert folders == [tmp_path / made.name] * 2
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == folders[:1]
    assert _files(folders[0]) == _files(made)


def test_a_killed_writer_leaves_nothing_that_is_used(made: Path, tmp_path: Path) -> None:
    writer = _start_writer(tmp_path, 30)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writes\n"
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(".*.partial/*/*/index.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    assert not (tmp_path / made.name).exists()
    assert any(tmp_path.glob(".*.partial"))
    assert _files(_make(tmp_path)) == _files(made)
    assert not any(tmp_path.glob(".*.partial"))


def test_a_root_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(DataError, match=r"cannot write the procedural scenes.*choose") as caught:
        _make(blocker / "cache")
    assert str(blocker) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("image_size", 0, 1), ("train_scenes", 0, 1), ("test_scenes", -1, 1), ("seed", -1, 0)],
)
def test_numbers_out_of_range_are_refused(
    tmp_path: Path, name: str, value: int, least: int
) -> None:
    arguments: dict[str, int] = {name: value}
    with pytest.raises(ValueError, match=f"{name}={value}: must be >= {least}"):
        ensure_procedural(tmp_path, **arguments)
