"""A stored scene renders later, without its pictures, as predict rendered it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from datamodules.multiview import MultiviewRays
from lightning_modules.callbacks.camera_path_writer import CameraPathWriter
from lightning_modules.scene_rendering import load_network, main, path_cameras, render_scene
from models.clift.checkpoint import export_clift
from models.clift.scene_file import load_scene, network_identity
from models.clift.selection import nearest_tokens, score_for_views
from tests.lightning_modules.clift_runs import (
    room_cache,
    rooms,
    tiny_clift,
    tiny_condensing,
    tiny_trainer,
)
from tests.models.clift_networks import shake

__all__ = ["room_cache"]
OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))


@pytest.fixture
def stored(room_cache: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Folder of a prediction along a path in the capture's world, its checkpoint, and the path."""
    return predict(tiny_condensing(budgets=(0.5,)), room_cache, tmp_path)


def predict(module: Any, room_cache: Path, folder: Path) -> tuple[Path, Path, Path]:  # noqa: ANN401
    shake(module.network)
    data = rooms(room_cache)
    source = data._data.evaluation_source
    poses = torch.from_numpy(source.cameras(0).pose[[2, 5, 0]]).float()
    path = folder / "path.json"
    frames = [{"transform_matrix": (pose @ OPENGL).tolist()} for pose in poses]
    path.write_text(json.dumps({"frames": frames}))
    data = rooms(room_cache, predict_count=1, camera_path=path)
    trainer = tiny_trainer(folder, callbacks=[CameraPathWriter()])
    trainer.predict(module, data, return_predictions=False)
    checkpoint = folder / "model.ckpt"
    trainer.strategy.connect(module)
    trainer.save_checkpoint(checkpoint)
    return folder / "predictions/procedural-test-000000", checkpoint, path


def run(*words: object) -> None:
    main([str(word) for word in words])


def failure(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a call that must fail."""
    with pytest.raises(SystemExit) as ending:
        run(*words)
    assert ending.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
@pytest.mark.parametrize("make", [tiny_clift, tiny_condensing])
def test_frames_are_those_of_predict(
    make: Any,  # noqa: ANN401
    room_cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    predicted, checkpoint, path = predict(make(budgets=(0.5,)), room_cache, tmp_path)
    scene, out = predicted / "scene.safetensors", tmp_path / "out"
    run("--scene", scene, "--checkpoint", checkpoint, "--camera_path", path, "--out", out)
    assert f"{out}: 3 frames from 32 tokens" in capsys.readouterr().out
    for number in range(3):
        name = f"frame-{number:04d}.png"
        assert (out / name).read_bytes() == (predicted / name).read_bytes(), name
    assert (out / "path.gif").stat().st_size > 100


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_the_file_knows_the_world_of_the_capture(
    stored: tuple[Path, Path, Path], room_cache: Path
) -> None:
    """Context cameras as the reader gives them stand where the file has them."""
    folder, _, _ = stored
    scene = load_scene(folder / "scene.safetensors")
    data = rooms(room_cache)
    data.setup("test")
    _, (frames, _) = data._data.evaluation_entries[0]
    world = data._data.evaluation_source.cameras(0).pose[list(frames)]
    points = scene.normalisation.double().numpy() @ np.moveaxis(world, 0, 2)[:, 3]
    assert_close(torch.from_numpy(points[:3].T).float(), scene.pose[:, :3, 3])
    assert not torch.equal(scene.normalisation, torch.eye(4))


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_render_budgets_take_the_tokens_nearest_to_each_frame(
    stored: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder, checkpoint, path = stored
    network = load_network(checkpoint)
    scene = load_scene(folder / "scene.safetensors", network_identity(network))
    cameras = path_cameras(scene, path, 1)
    everything = render_scene(network, scene, cameras)
    assert_close(render_scene(network, scene, cameras, tokens=32), everything, atol=1e-5, rtol=0)
    few = render_scene(network, scene, cameras, tokens=5)
    assert_close(render_scene(network, scene, cameras, 5, chunk=1), few, atol=1e-5, rtol=0)
    assert (few - everything).abs().max() > 1e-3
    size = (scene.height, scene.width)
    where = (scene.rays, scene.camera, cameras.intrinsics, cameras.pose)
    for frame, chosen in enumerate(nearest_tokens(score_for_views(*where, *size), 5)):
        part = type(scene)(**{**vars(scene), "tokens": scene.tokens[chosen]})
        one = type(cameras)(*(value[frame : frame + 1] for value in cameras))
        assert_close(render_scene(network, part, one)[0], few[frame], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_without_a_path_it_goes_from_context_view_to_context_view(
    stored: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder, checkpoint, _ = stored
    words = ["--scene", folder / "scene.safetensors", "--checkpoint", checkpoint]
    run(*words, "--frames", 7, "--tokens", 9, "--out", tmp_path / "between")
    assert len(list((tmp_path / "between").glob("frame-*.png"))) == 7
    scene = load_scene(folder / "scene.safetensors")
    cameras = path_cameras(scene, None, 7)
    assert_close(cameras.pose[::2], scene.pose, atol=1e-5, rtol=0)
    assert_close(cameras.intrinsics[::2], scene.intrinsics)


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_failures_are_one_line(
    stored: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, checkpoint, path = stored
    scene = folder / "scene.safetensors"
    other = tiny_condensing()
    shake(other.network, seed=3)
    save_file(export_clift(other.network), tmp_path / "other.safetensors")
    capsys.readouterr()
    good = ["--out", tmp_path / "out", "--scene", scene, "--checkpoint", checkpoint]
    cases: list[tuple[list[object], str]] = [
        (
            ["--checkpoint", tmp_path / "other.safetensors"],
            "made by network",
        ),
        (["--checkpoint", tmp_path / "no.ckpt"], "no.ckpt: no such file"),
        (["--checkpoint", tmp_path], "no whole checkpoint"),
        (["--scene", tmp_path / "no.safetensors"], "no.safetensors: no such file"),
        (["--scene", path], "incomplete, damaged or no scene"),
        (["--camera_path", checkpoint], "cannot be read as a camera path"),
        (["--tokens", 33], "tokens=33: must be from 1 to the 32 stored tokens"),
        (["--tokens", 0], "tokens=0: must be from 1"),
        (["--frames", 0], "frames=0, chunk=8: must be >= 1"),
        (["--frames_per_second", 99], r"frames_per_second=99.0: must be in \(0, 50\]"),
    ]
    for words, message in cases:
        line = failure(capsys, *good, *words)
        assert re.search(message, line), line
    tensors = load_file(scene)
    with safe_open(scene, "pt") as file:
        header = file.metadata()
    save_file({**tensors, "normalisation": torch.zeros(4, 4)}, scene, header)
    assert "expected a similarity" in failure(capsys, *good, "--camera_path", path)
    assert not (tmp_path / "out").exists()


def test_the_batch_brings_its_normalisation(room_cache: Path) -> None:
    data: MultiviewRays = rooms(room_cache)
    for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        assert batch["normalisation"].shape == (2, 4, 4)
        assert batch["normalisation"].dtype == torch.float32
