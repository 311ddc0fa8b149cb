"""Evaluated views: from the index, held out of captures, and along camera paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.errors import DataError
from datamodules.multiview import MultiviewRays
from tests.datamodules.scene_roots import (
    OPENGL,
    SMALL,
    batches,
    pose,
    re10k_root,
    write_capture,
    write_chunks,
)


def colours(image: Tensor) -> list[list[int]]:
    """Red and green of the first pixel of every view, (V, 3, H, W) -> V pairs."""
    return (image[:, :2, 0, 0] * 255).round().int().tolist()


def test_evaluation_takes_exactly_the_indexed_views(tmp_path: Path) -> None:
    root = re10k_root(tmp_path, frames=8)
    index = {
        "b2": {"context": [5, 0], "target": [3, 3, 5]},
        "b0": None,
        "b1": {"context": [1, 2, 7], "target": [0]},
    }
    (tmp_path / "other.json").write_text(json.dumps(index))
    data = MultiviewRays(root, evaluation_index=tmp_path / "other.json", **SMALL)
    data.setup("test")
    (batch,) = batches(data.test_dataloader())
    assert batch["scene"] == ["b2", "b1"]
    assert batch["index"].tolist() == [0, 1]
    assert batch["context"]["frame"].tolist() == [[5, 0, 0], [1, 2, 7]]
    assert batch["context"]["valid"].tolist() == [[True, True, False], [True] * 3]
    assert batch["target"]["frame"].tolist() == [[3, 3, 5], [0, 0, 0]]
    assert batch["target"]["valid"].tolist() == [[True] * 3, [True, False, False]]
    assert colours(batch["target"]["image"][0]) == [[20, 15], [20, 15], [20, 25]]
    for role in ("context", "target"):
        views = batch[role]
        for name in ("image", "pose", "intrinsics", "distortion", "frame"):
            assert not views[name][~views["valid"]].any()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {f"z{n}": {"context": [0], "target": [1]} for n in range(7)},
            r"7 of its 7 scenes are not in the data \(3 scenes\): z0, .*, z4 and 2 more; fetch",
        ),
        (
            {f"b{n}": {"context": [0], "target": [n + 4]} for n in range(3)},
            r"1 of its 3 scenes have fewer frames than it names: b2 \(frame 6 of 6\); use the",
        ),
        ({"b0": None}, "no scene to evaluate among 1 entries"),
        ({}, "no scene to evaluate among 0 entries"),
        ({"b0": {"context": [0]}}, "scene b0: expected null, or context and target"),
        ({"b0": {"context": [0], "target": [-1]}}, "scene b0: expected null"),
        ({"b0": {"context": [0], "target": [True]}}, "scene b0: expected null"),
        ({"b0": {"context": [0], "target": []}}, "scene b0: expected null"),
        ([], "expected {scene"),
    ],
)
def test_an_index_that_does_not_match_stops_before_the_first_batch(
    index: Any,  # noqa: ANN401
    message: str,
    tmp_path: Path,
) -> None:
    root = re10k_root(tmp_path)
    (root / "evaluation_index.json").write_text(json.dumps(index))
    for stage in ("fit", "validate", "test", "predict"):
        with pytest.raises(DataError, match=rf"evaluation_index\.json: .*{message}"):
            MultiviewRays(root, **SMALL).setup(stage)


def test_without_an_index_there_is_no_silent_test(tmp_path: Path) -> None:
    root = re10k_root(tmp_path)
    (root / "evaluation_index.json").unlink()
    with pytest.raises(DataError, match=r"no evaluation index; set data\.init_args\.evaluation_in"):
        MultiviewRays(root, **SMALL).setup("test")


def test_roots_without_splits_train_on_the_scenes_that_are_not_evaluated(tmp_path: Path) -> None:
    write_chunks(tmp_path, {"a": 6, "b": 6, "c": 6, "d": 6})
    index: dict[str, Any] = {"b": {"context": [0, 5], "target": [2]}, "c": None}
    (tmp_path / "evaluation_index.json").write_text(json.dumps(index))
    data = MultiviewRays(tmp_path, batch_size=2, **SMALL)
    assert {scene for batch in data.train_dataloader() for scene in batch["scene"]} == {"a", "d"}
    assert [batch["scene"] for batch in data.val_dataloader()] == [["b"]]
    index |= {"a": None, "d": None}
    (tmp_path / "evaluation_index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"evaluation_index\.json names every scene"):
        MultiviewRays(tmp_path, **SMALL).setup("fit")


def test_a_capture_holds_out_frames(tmp_path: Path) -> None:
    data = MultiviewRays(
        write_capture(tmp_path / "room", 12, k1=0.2), hold_out_every=4, batch_size=1, **SMALL
    )
    data.setup("fit")
    (batch,) = batches(data.val_dataloader())
    assert batch["scene"] == ["room"]
    assert batch["context"]["frame"].tolist() == [[1, 11]]
    assert batch["target"]["frame"].tolist() == [[0, 4, 8]]
    assert batch["context"]["distortion"][0, 0].tolist() == pytest.approx([0.2, 0, 0, 0])
    loader = data.train_dataloader()
    seen = [batch for _ in range(20) for batch in batches(loader)]
    used = {frame for batch in seen for frame in batch["target"]["frame"].flatten().tolist()}
    used |= {frame for batch in seen for frame in batch["context"]["frame"].flatten().tolist()}
    assert used == set(range(12)) - {0, 4, 8}


def test_paths_lead_from_context_view_to_context_view(tmp_path: Path) -> None:
    data = MultiviewRays(re10k_root(tmp_path), predict_count=2, path_frames=5, **SMALL)
    data.setup("predict")
    (batch,) = batches(data.predict_dataloader())
    assert batch["scene"] == ["b0", "b1"]
    target = batch["target"]
    assert target["image"].shape == (2, 5, 3, 6, 6)
    assert not target["image"].any()
    assert target["valid"].all()
    assert (target["frame"] == -1).all()
    torch.testing.assert_close(target["pose"][:, [0, -1]], batch["context"]["pose"])
    torch.testing.assert_close(target["intrinsics"][:, 2], batch["context"]["intrinsics"][:, 0])


@pytest.mark.parametrize("rule", ["re10k", "dl3dv"])
def test_paths_from_a_file_lie_in_the_scenes_own_world(rule: Any, tmp_path: Path) -> None:  # noqa: ANN401
    frames = [{"transform_matrix": (pose(frame) @ OPENGL).tolist()} for frame in (0, 4, 2, 90)]
    (tmp_path / "path.json").write_text(json.dumps({"frames": frames}))
    root = re10k_root(tmp_path / "root")
    options: dict[str, Any] = {**SMALL, "pose_normalisation": rule}
    data = MultiviewRays(root, camera_path=tmp_path / "path.json", **options)
    (batch,) = batches(data.predict_dataloader())
    (between,) = batches(MultiviewRays(root, **options).predict_dataloader())
    close: Any = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(batch["context"]["pose"], between["context"]["pose"])
    torch.testing.assert_close(batch["target"]["pose"][:, :2], batch["context"]["pose"], **close)
    assert batch["target"]["pose"][:, 3, :3, 3].abs().max() > 10


@pytest.mark.parametrize("text", ["{", "{}", '{"frames": [{"transform_matrix": [1, 2]}]}'])
def test_files_that_are_no_path_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "path.json").write_text(text)
    data = MultiviewRays(re10k_root(tmp_path / "root"), camera_path=tmp_path / "path.json", **SMALL)
    with pytest.raises(DataError, match=r"path\.json: "):
        data.predict_dataloader()
