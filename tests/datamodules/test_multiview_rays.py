"""Batches of the data module, from every layout and from the embedded scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.multiview import MultiviewRays
from datamodules.multiview.augmentation import Augmentation
from datamodules.multiview.batch import MultiviewBatch
from datamodules.samplers import EvaluationSampler
from tests.datamodules.scene_roots import SMALL, batches, pose, re10k_root


def colours(image: Tensor) -> list[list[int]]:
    """Red and green of the first pixel of every view, (V, 3, H, W) -> V pairs."""
    return (image[:, :2, 0, 0] * 255).round().int().tolist()


def assert_same(one: MultiviewBatch, two: MultiviewBatch) -> None:
    assert one["scene"] == two["scene"]
    assert torch.equal(one["index"], two["index"])
    for first, second in ((one["context"], two["context"]), (one["target"], two["target"])):
        values: Any = second
        expected: Any = first
        for name in expected:
            assert torch.equal(values[name], expected[name]), name


def test_training_batches_have_the_promised_form(tmp_path: Path) -> None:
    data = MultiviewRays(re10k_root(tmp_path), batch_size=4, **SMALL)
    data.setup("fit")
    found = batches(data.train_dataloader())
    assert len(found) == 2
    for batch in found:
        for role, count in (("context", 2), ("target", 3)):
            views: Any = batch[role]  # type: ignore[literal-required]
            assert {name: (value.shape, value.dtype) for name, value in views.items()} == {
                "image": ((4, count, 3, 6, 6), torch.float32),
                "pose": ((4, count, 4, 4), torch.float32),
                "intrinsics": ((4, count, 4), torch.float32),
                "distortion": ((4, count, 4), torch.float32),
                "frame": ((4, count), torch.int64),
                "valid": ((4, count), torch.bool),
            }
            assert views["valid"].all()
            for row, index in enumerate(batch["index"].tolist()):
                expected = [[10 * index, 5 * frame] for frame in views["frame"][row].tolist()]
                assert colours(views["image"][row]) == expected
        assert batch["scene"] == [f"a{index}" for index in batch["index"].tolist()]
    assert sorted(torch.cat([batch["index"] for batch in found]).tolist()) == list(range(8))


def test_poses_and_intrinsics_belong_to_their_frames(tmp_path: Path) -> None:
    data = MultiviewRays(re10k_root(tmp_path), **SMALL)
    for batch in batches(data.train_dataloader()):
        for row in range(len(batch["scene"])):
            frames = torch.cat([batch["context"]["frame"][row], batch["target"]["frame"][row]])
            poses = torch.cat([batch["context"]["pose"][row], batch["target"]["pose"][row]])
            world = torch.from_numpy(np.stack([pose(frame) for frame in frames.tolist()]))
            turns = poses[:, :3, :3].double()
            # Relative rotations survive any choice of the world.
            torch.testing.assert_close(
                turns[0].T @ turns, world[0, :3, :3].T @ world[:, :3, :3], atol=1e-5, rtol=0
            )
            assert poses[:, :3, 3].abs().max() == pytest.approx(1, abs=1e-6)
        # 8 x 6 pixels are cropped to 6 x 6; the released rule keeps cx / W.
        expected = torch.tensor([0.9 * 8, 1.2 * 6, 3.0, 3.0])
        torch.testing.assert_close(batch["target"]["intrinsics"][0, 0], expected)


def test_batches_do_not_depend_on_workers_caching_or_order_of_calls(tmp_path: Path) -> None:
    root = re10k_root(tmp_path)
    augmentation = Augmentation(0.5, 0.5, 0.5)
    options: dict[str, Any] = {**SMALL, "augmentation": augmentation, "seed": 3}
    whole = MultiviewRays(root, **options).train_dataloader()
    first, second = batches(whole), batches(whole)
    for other in (
        MultiviewRays(root, **options, num_workers=2),
        MultiviewRays(root, **options, cache_decoded_mb=0),
    ):
        loader = other.train_dataloader()
        for one, two in zip([*first, *second], [*loader, *loader], strict=True):
            assert_same(one, two)
    assert any(
        not torch.equal(one["target"]["frame"], two["target"]["frame"])
        for one, two in zip(first, second, strict=True)
    )


def test_ranks_share_out_the_global_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = re10k_root(tmp_path)
    whole = batches(MultiviewRays(root, batch_size=4, **SMALL).train_dataloader())
    parts = []
    for rank in range(2):
        place = "datamodules.module_loaders.rank_and_world_size"
        monkeypatch.setattr(place, lambda _, rank=rank: (rank, 2))
        data = MultiviewRays(root, batch_size=2, **SMALL)
        parts.append(batches(data.train_dataloader()))
        evaluated = [scene for batch in batches(data.val_dataloader()) for scene in batch["scene"]]
        assert evaluated == [["b0", "b1"], ["b2"]][rank]
    for batch, *halves in zip(whole, *parts, strict=True):
        assert batch["scene"] == [scene for half in halves for scene in half["scene"]]
        images = torch.cat([half["target"]["image"] for half in halves])
        assert torch.equal(batch["target"]["image"], images)


def test_training_context_is_filled_up_to_the_most_views(tmp_path: Path) -> None:
    root = re10k_root(tmp_path)
    data = MultiviewRays(root, image_size=6, context_views=(2, 5), target_views=1, batch_size=2)
    counts = set()
    for batch in [batch for _ in range(4) for batch in batches(data.train_dataloader())]:
        valid = batch["context"]["valid"]
        assert valid.shape == (2, 5)
        assert not batch["context"]["pose"][~valid].any()
        counts |= set(valid.sum(1).tolist())
    assert counts <= {2, 3, 4, 5}
    assert len(counts) > 1


def test_the_fingerprint_follows_data_and_size(tmp_path: Path) -> None:
    root = re10k_root(tmp_path)
    one = MultiviewRays(root, **SMALL).data_fingerprint
    assert len(one) == 16
    assert MultiviewRays(root, **SMALL, batch_size=1, seed=4).data_fingerprint == one
    others = [
        MultiviewRays(root, **{**SMALL, "image_size": 5}).data_fingerprint,
        MultiviewRays(root, **SMALL, pose_normalisation="dl3dv").data_fingerprint,
    ]
    index = root / "evaluation_index.json"
    index.write_text(index.read_text().replace("[2, 3]", "[3, 2]"))
    others.append(MultiviewRays(root, **SMALL).data_fingerprint)
    assert len({one, *others}) == 4


def test_embedded_scenes_come_through_the_same_reader(tmp_path: Path) -> None:
    data = MultiviewRays(image_size=8, procedural_scenes=(4, 2), cache_dir=tmp_path, batch_size=2)
    data.setup("fit")
    for batch in batches(data.train_dataloader()):
        assert (batch["context"]["frame"] // 2).tolist() == [[0, 1, 2, 3]] * 2
        for row in range(2):
            views = [batch[role]["frame"][row].tolist() for role in ("context", "target")]
            assert len({*views[0], *views[1]}) == 10
    (batch,) = batches(data.val_dataloader())
    assert batch["context"]["frame"].tolist() == [[0, 2, 4, 6]] * 2
    assert batch["target"]["frame"].tolist() == [[8, 9, 10, 11, 12, 13]] * 2
    assert data.source_name == "procedural"
    assert len(EvaluationSampler(2, 8)) == 1
