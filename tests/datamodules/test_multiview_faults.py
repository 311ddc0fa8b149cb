"""Scenes that are filtered out, unusable data and arguments out of range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from datamodules.errors import DataError
from datamodules.multiview import MultiviewRays
from datamodules.multiview.scene_filter import SceneFilter
from datamodules.multiview.view_sampler import ViewSampling
from tests.datamodules.scene_roots import (
    SMALL,
    batches,
    re10k_root,
    stored_scene,
    write_capture,
    write_chunks,
)


def test_only_scenes_that_pass_the_filter_are_trained_on(tmp_path: Path) -> None:
    root = re10k_root(tmp_path, train=2, frames=6)
    wide, far = stored_scene("wide", frames=9), stored_scene("far", frames=9)
    wide["cameras"][4, 0] = 0.4
    far["cameras"][3, 9] = 2000
    bad = stored_scene("bad", frames=9)
    bad["cameras"][2, 6:] *= 2
    size = stored_scene("size", frames=9, height=7)
    torch.save([wide, far, bad, size, stored_scene("good", frames=9)], root / "train/9.torch")
    (root / "train/index.json").unlink()

    def kept(scenes: SceneFilter) -> set[str]:
        data = MultiviewRays(root, batch_size=1, scenes=scenes, cache_decoded_mb=0, **SMALL)
        reader = data._data.training_source.reader
        return {reader.names[place] for place in data._data.training_positions.tolist()}

    everything = {"a0", "a1", "wide", "far", "bad", "size", "good"}
    assert kept(SceneFilter()) == everything
    assert kept(SceneFilter(min_frames=7)) == everything - {"a0", "a1"}
    assert kept(SceneFilter(native_size=(6, 8))) == everything - {"size"}
    assert kept(SceneFilter(skip_unusable=True)) == everything - {"bad"}
    both = SceneFilter(max_view_angle=100, max_distance=1000, skip_unusable=True)
    assert kept(both) == everything - {"bad", "far", "wide"}
    with pytest.raises(DataError, match="scene bad: frame 2 has a pose that is no rotation"):
        kept(SceneFilter(max_distance=1000))
    with pytest.raises(DataError, match="none of 7 training scenes meets"):
        kept(SceneFilter(min_frames=100))


def test_the_filters_outcome_is_kept_until_the_data_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = re10k_root(tmp_path)
    checked: list[int] = []
    original = SceneFilter.passes

    def passes(self: SceneFilter, reader: Any, position: int) -> bool:  # noqa: ANN401
        checked.append(position)
        return original(self, reader, position)

    monkeypatch.setattr(SceneFilter, "passes", passes)
    for count in (8, 8):
        data = MultiviewRays(root, scenes=SceneFilter(min_frames=2), **SMALL)
        assert len(data._data.training_positions) == count
    assert len(checked) == 8
    write_chunks(root / "train", {"a": 1, "b": 3})
    data = MultiviewRays(root, scenes=SceneFilter(min_frames=2), cache_decoded_mb=0, **SMALL)
    assert data._data.training_positions.tolist() == [1]


def test_unusable_scenes_may_be_skipped_up_to_a_share(tmp_path: Path) -> None:
    root = re10k_root(tmp_path)
    scene = stored_scene("a0")
    scene["images"] = [torch.zeros(9, dtype=torch.uint8)] * 6
    torch.save([scene, stored_scene("a1", 1)], root / "train/000000.torch")
    options: dict[str, Any] = {**SMALL, "cache_decoded_mb": 0}
    with pytest.raises(DataError, match=r"scene a0: frame \d: cannot decode the image"):
        batches(MultiviewRays(root, **options).train_dataloader())
    skipping = MultiviewRays(root, **options, on_error="skip", max_skipped_share=0.2)
    with pytest.warns(UserWarning, match="skipped .*scene a0"):
        scenes = [scene for batch in skipping.train_dataloader() for scene in batch["scene"]]
    assert sorted(scenes) == ["a1", "a1", *(f"a{n}" for n in range(2, 8))]
    strict = MultiviewRays(root, **options, on_error="skip", max_skipped_share=0.1)
    with pytest.raises(DataError, match=r"1 of 8 training scenes unusable, more than max_skip"):
        batches(strict.train_dataloader())


def test_errors_come_through_workers_in_one_line(tmp_path: Path) -> None:
    root = re10k_root(tmp_path, frames=2)
    options: dict[str, Any] = {**SMALL, "context_views": (3, 3), "num_workers": 1}
    with pytest.raises(DataError) as caught:
        batches(MultiviewRays(root, **options).train_dataloader())
    assert len(str(caught.value).splitlines()) == 1
    assert "2 training frames, fewer than 3 context views" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0: must be >= 1 \(data\.init_args\.batch_size\)"),
        ({"context_views": (3, 2)}, r"context_views=\(3, 2\): must be the fewest and the most"),
        ({"context_views": (0, 2)}, r"context_views=\(0, 2\)"),
        ({"hold_out_every": 1}, "hold_out_every=1: would hold out every frame"),
        ({"max_skipped_share": 2}, r"max_skipped_share=2: must be 0 \.\. 1"),
        ({"image_width": 64}, "image_width=64: the embedded scenes are square"),
        ({"context_views": (2, 2)}, "context_views=.*: the embedded scenes have 4"),
        ({"procedural_scenes": (0, 1)}, "procedural_scenes=.*: must be two numbers"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiviewRays(**arguments)


@pytest.mark.parametrize("name", ["root", "evaluation_index", "camera_path"])
def test_paths_that_lead_nowhere_are_named(name: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"root": tmp_path, name: tmp_path / "nothing"}
    with pytest.raises(FileNotFoundError, match=rf"init_args\.{name}=.*nothing: no such f"):
        MultiviewRays(**arguments)


def test_roots_that_hold_nothing_or_two_layouts_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: nothing found; looked for train/index\.json"):
        MultiviewRays(tmp_path / "empty").setup("fit")
    with pytest.raises(DataError, match="empty: no transforms data"):
        MultiviewRays(tmp_path / "empty", format="transforms").setup("fit")
    write_capture(re10k_root(tmp_path / "both") / "room")
    with pytest.raises(DataError, match="ambiguous, holds re10k and transforms; set data"):
        MultiviewRays(tmp_path / "both").setup("fit")


def test_every_argument_can_be_set_on_the_command_line() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MultiviewRays, "data")
    parsed = parser.parse_args(
        [
            "--data.context_views=[4,6]",
            "--data.views.mode=groups",
            "--data.views.groups=[[0,1],[2]]",
            "--data.scenes.native_size=[360,640]",
            "--data.augmentation.mirror=0.5",
            "--data.pose_normalisation=dl3dv",
        ]
    )
    data = parser.instantiate(parsed).data
    assert data.views == ViewSampling("groups", groups=((0, 1), (2,)))
    assert data.scenes == SceneFilter(native_size=(360, 640))
    assert (data.context_views, data.augmentation.mirror) == ((4, 6), 0.5)
