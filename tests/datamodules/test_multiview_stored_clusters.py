"""Stored clusters: which views they fix, what comes into the batch, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.errors import DataError, SampleError
from datamodules.keyed_random import keyed_generator
from datamodules.multiview import MultiviewRays
from datamodules.multiview.augmentation import Augmentation
from datamodules.multiview.cluster_annotation import annotation_loader
from datamodules.multiview.stored_clusters import ClusterFolder, SceneClusters
from datamodules.multiview.view_sampler import ViewSampling
from tests.datamodules.scene_roots import re10k_root

# Two views of 2 x 1 tokens; cluster 2 is empty, as faiss leaves them.
FIRST = {
    "condition_view_idx": [0, 5],
    "num_keep": 3,
    "num_views": 2,
    "anchor_idx": [2, 0, 3],
    "labels": [1, 1, 0, 3],
}
SECOND = {
    "condition_view_idx": [1, 2, 4],
    "num_keep": 2,
    "num_views": 3,
    "anchor_idx": [5, 0],
    "labels": [1, 1, 0, 0, 0, 0],
}
OPTIONS: dict[str, Any] = {
    "image_size": 6,
    "context_views": (2, 3),
    "target_views": 3,
    "batch_size": 2,
    "views": ViewSampling("bounded", targets="unseen"),
}


def write(folder: Path, scene: str, content: Any) -> Path:  # noqa: ANN401
    file = folder / scene / "metadata.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def annotated(tmp_path: Path, content: Any, scenes: int = 4, **changes: Any) -> MultiviewRays:  # noqa: ANN401
    root = re10k_root(tmp_path / "data", train=scenes)
    for scene in range(scenes):
        write(tmp_path / "clusters", f"a{scene}", content)
    return MultiviewRays(root, clusters=tmp_path / "clusters", **{**OPTIONS, **changes})


def test_context_views_are_the_entrys_and_clusters_come_along(tmp_path: Path) -> None:
    data = annotated(tmp_path, {"1": FIRST, "10": SECOND, "made": "elsewhere"})
    loader = data.train_dataloader()
    seen = set()
    for batch in [batch for _ in range(6) for batch in loader]:
        context, clusters = batch["context"], batch["clusters"]
        assert clusters["labels"].shape == (2, 6)
        assert clusters["encoder"] == ["", ""]
        for row in range(2):
            frames = tuple(context["frame"][row][context["valid"][row]].tolist())
            seen.add(frames)
            labels, anchors = clusters["labels"][row].tolist(), clusters["anchors"][row].tolist()
            targets = set(batch["target"]["frame"][row].tolist())
            if frames == (0, 5):
                assert labels == [1, 1, 0, 2, -1, -1], "numbered as the anchors, no gap"
                assert anchors[:3] == [2, 0, 3]
                assert targets <= {1, 2, 3, 4}
            else:
                assert labels == [1, 1, 0, 0, 0, 0]
                assert anchors[:2] == [5, 0]
                assert targets == {3}
            assert int(clusters["num_clusters"][row]) == (3 if frames == (0, 5) else 2)
    assert seen == {(0, 5), (1, 2, 4)}


def test_the_draw_is_keyed_and_a_flat_file_is_one_entry(tmp_path: Path) -> None:
    data = annotated(tmp_path, {"1": FIRST, "2": SECOND})
    again = MultiviewRays(data.root, clusters=data.clusters, **OPTIONS)
    for one, other in zip(data.train_dataloader(), again.train_dataloader(), strict=True):
        torch.testing.assert_close(one["context"], other["context"])
        torch.testing.assert_close(one["target"], other["target"])
        assert torch.equal(one["clusters"]["labels"], other["clusters"]["labels"])
    folder = ClusterFolder(tmp_path / "flat")
    write(folder.folder, "a", FIRST)
    assert folder.draw("a", keyed_generator(0)).context == (0, 5)
    assert folder.draw("a", keyed_generator(0)).labels.tolist() == [1, 1, 0, 2]


def test_without_a_folder_batches_hold_no_clusters(tmp_path: Path) -> None:
    data = MultiviewRays(re10k_root(tmp_path), **OPTIONS)
    assert "clusters" not in next(iter(data.train_dataloader()))


@pytest.mark.parametrize("mode", ["spread", "bounded"])
@pytest.mark.parametrize("targets", ["span", "unseen"])
def test_targets_follow_the_mode(mode: Any, targets: Any, tmp_path: Path) -> None:  # noqa: ANN401
    data = annotated(tmp_path, SECOND, views=ViewSampling(mode, targets=targets))
    loader = data.train_dataloader()
    batches = [batch for _ in range(8) for batch in loader]
    frames = {frame for batch in batches for frame in batch["target"]["frame"].flatten().tolist()}
    expected = {"bounded": {"span": {1, 2, 3, 4}, "unseen": {3}}}
    assert frames == expected.get(mode, {}).get(targets, {0, 3, 5})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1, 1, 0]}, r"3 labels and num_views=2 do not fit 2 context views"),
        ({"num_views": 3}, r"4 labels and num_views=3 do not fit 2 context views"),
        ({"num_keep": 2}, r"num_keep=2, but 3 anchors"),
        ({"anchor_idx": [2, 0, 1]}, r"anchor 1 lies outside its cluster: cluster 1 has another"),
        ({"anchor_idx": [2, 0, 4]}, r"anchor 4, but only 4 tokens"),
        ({"anchor_idx": [2, 0], "num_keep": 2}, r"cluster 3 has no anchor inside it"),
        ({"anchor_idx": []}, r"anchor_idx is no list of whole numbers >= 0"),
        ({"labels": [1, 1, 0, float("nan")]}, r"labels is no list of whole numbers >= 0"),
        ({"labels": [1, 1, 0, -1]}, r"labels is no list of whole numbers >= 0"),
        ({"labels": [1, 1, [0], 3]}, r"labels is no list of whole numbers >= 0"),
        ({"labels": [1, 1, 0, 2**70]}, r"labels is no list of whole numbers >= 0"),
        ({"labels": None}, r"labels is no list of whole numbers >= 0"),
        ({"condition_view_idx": [0, "5"]}, r"condition_view_idx is no list of whole numbers >= 0"),
        ({"condition_view_idx": [0, 6]}, r"names frame 6, the scene has 6"),
        ({"encoder": 3}, r"encoder=3: expected text"),
    ],
)
def test_bad_entries_are_named_in_one_line(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = annotated(tmp_path, {"7": {**FIRST, **change}})
    with pytest.raises(SampleError, match=message) as caught:
        next(iter(data.train_dataloader()))
    assert "\n" not in str(caught.value)
    assert "/clusters/a" in str(caught.value)
    assert "metadata.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1]", "holds no JSON object"),
        ('{"1": 4}', "entry 1 is no object"),
        ("{}", "condition_view_idx is no list"),
    ],
)
def test_files_that_hold_no_clusters_are_named(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, "room", {})
    (tmp_path / "room/metadata.json").write_text(text)
    with pytest.raises(SampleError, match=f"room/metadata.json.*{message}") as caught:
        ClusterFolder(tmp_path).draw("room", keyed_generator(0))
    assert "\n" not in str(caught.value)


def test_missing_scenes_stop_before_the_first_batch_or_are_skipped(tmp_path: Path) -> None:
    data = annotated(tmp_path, FIRST)
    lost = tmp_path / "clusters/a2/metadata.json"
    lost.unlink()
    with pytest.raises(DataError, match=r"no clusters of 1 of 4 training scenes: .*a2/metadata"):
        data.train_dataloader()
    data = MultiviewRays(
        data.root, clusters=data.clusters, on_error="skip", max_skipped_share=0.3, **OPTIONS
    )
    with pytest.warns(UserWarning, match=r"skipped .*a2/metadata.json: no such file"):
        scenes = {name for batch in data.train_dataloader() for name in batch["scene"]}
    assert "a2" not in scenes
    with pytest.raises(DataError, match=r"no clusters of 4 of 4"):
        MultiviewRays(data.root, clusters=tmp_path / "no", **OPTIONS).train_dataloader()


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/a", "", "a//b", ".", "a\\b", "a\0b"])
def test_scene_names_never_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    folder = ClusterFolder(tmp_path / "clusters")
    with pytest.raises(SampleError, match="leads out of the folder") as caught:
        folder.write(name, [])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.json"))
    assert folder.file("split/room.1").is_relative_to(folder.folder)


def test_scenes_of_differently_many_tokens_a_view_are_refused(tmp_path: Path) -> None:
    data = annotated(tmp_path, FIRST, scenes=2)
    write(tmp_path / "clusters", "a1", {**FIRST, "labels": [1, 1, 0, 3, 0, 0]})
    with pytest.raises(DataError, match=r"stored clusters of \d tokens a view, those of scene a"):
        next(iter(data.train_dataloader()))


def test_pictures_must_be_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"augmentation=.*unchanged pictures"):
        annotated(tmp_path, FIRST, augmentation=Augmentation(mirror=0.5))


def test_written_clusters_come_back_and_a_failed_write_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ClusterFolder(tmp_path)
    clusters = SceneClusters((3, 1), np.array([0, 1, 1, 0]), np.array([3, 1]), "abc")
    folder.write("hall/room", [clusters, clusters._replace(context=(0, 1))])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        folder.write("hall/room", [])
    first, second = folder.read("hall/room")
    assert (first.context, second.context, first.encoder) == ((3, 1), (0, 1), "abc")
    assert first.labels.tolist() == [0, 1, 1, 0]
    assert first.anchors.tolist() == [3, 1]
    assert [file.name for file in (tmp_path / "hall/room").iterdir()] == ["metadata.json"]


def test_a_folder_belongs_to_what_made_it(tmp_path: Path) -> None:
    folder = ClusterFolder(tmp_path / "new")
    folder.claim({"encoder": "abc", "keep": (0.1, 1.0)})
    folder.claim({"encoder": "abc", "keep": (0.1, 1.0)})
    with pytest.raises(DataError, match=r"made_by.json: .*made with encoder=abc, now it is def"):
        folder.claim({"encoder": "def", "keep": (0.1, 1.0)})
    write(tmp_path / "foreign", "a0", FIRST)
    with pytest.raises(DataError, match=r"foreign: holds files, but no made_by.json"):
        ClusterFolder(tmp_path / "foreign").claim({"encoder": "abc"})


def test_annotation_draws_each_scene_as_often_as_asked_whichever_are_left(tmp_path: Path) -> None:
    data = MultiviewRays(re10k_root(tmp_path, frames=9), **OPTIONS)
    whole = {batch["scene"][0]: batch for batch in annotation_loader(data, range(8), 3)}
    assert sorted(whole) == data.training_scenes == [f"a{scene}" for scene in range(8)]
    (part,) = annotation_loader(data, [5], 3)
    assert part["scene"] == ["a5"] * 3
    torch.testing.assert_close(part["context"], whole["a5"]["context"])
    draws = [{str(frames) for frames in batch["context"]["frame"]} for batch in whole.values()]
    assert max(map(len, draws)) > 1, "the draws of a scene differ"
    assert len(set.union(*draws)) > 3
