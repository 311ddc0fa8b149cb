"""Mirrored and recoloured scenes stay exact photographs of one scene."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.multiview import MultiviewRays
from datamodules.multiview.augmentation import Augmentation
from datamodules.multiview.batch import MultiviewBatch
from tests.datamodules.scene_roots import SMALL, batches, re10k_root, write_capture


def test_mirroring_keeps_projected_points_on_their_pixels(tmp_path: Path) -> None:
    root = write_capture(tmp_path / "room", cx=3.0, cy=2.5, k1=0.1, k2=0.02, p1=0.01, p2=-0.02)
    options: dict[str, Any] = {**SMALL, "image_width": 8, "hold_out_every": 0, "batch_size": 1}
    plain, mirrored = (
        next(iter(MultiviewRays(root, **options, augmentation=change).train_dataloader()))["target"]
        for change in (Augmentation(), Augmentation(mirror=1))
    )
    assert torch.equal(mirrored["image"], plain["image"].flip(-1))
    point = torch.tensor([0.3, -0.2, 4.0])
    one = projected(plain, point)
    two = projected(mirrored, point * torch.tensor([-1.0, 1, 1]))
    torch.testing.assert_close(two[..., 0], 8 - one[..., 0])
    torch.testing.assert_close(two[..., 1], one[..., 1])
    # The lens is not symmetric, so leaving its p2 as it is would be seen.
    mirrored["distortion"][..., 3] *= -1
    assert (projected(mirrored, point * torch.tensor([-1.0, 1, 1])) - two).abs().max() > 1e-4


def projected(views: Any, point: Tensor) -> Tensor:  # noqa: ANN401
    """Pixel of a point of the world in every view, by OpenCV's lens model, (B, V, 2)."""
    homogeneous = torch.cat([point, torch.ones(1)])
    local = (torch.linalg.inv(views["pose"]) @ homogeneous)[..., :3]
    x, y = (local[..., :2] / local[..., 2:]).unbind(-1)
    k1, k2, p1, p2 = views["distortion"].unbind(-1)
    square = x * x + y * y
    radial = 1 + k1 * square + k2 * square**2
    bent_x = x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x)
    bent_y = y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y
    fx, fy, cx, cy = views["intrinsics"].unbind(-1)
    return torch.stack([fx * bent_x + cx, fy * bent_y + cy], dim=-1)


def test_colour_changes_are_exact_and_shared_by_all_views(tmp_path: Path) -> None:
    root = re10k_root(tmp_path)

    def first(change: Augmentation) -> MultiviewBatch:
        loader = MultiviewRays(root, **SMALL, augmentation=change).train_dataloader()
        return batches(loader)[0]

    plain, inverted = first(Augmentation()), first(Augmentation(invert_colours=1))
    torch.testing.assert_close(inverted["target"]["image"], 1 - plain["target"]["image"])
    permuted = first(Augmentation(permute_colours=1))
    orders = set()
    for row in range(4):
        both = [
            torch.cat([batch[r]["image"][row] for r in ("context", "target")])
            for batch in (plain, permuted)
        ]
        fitting = [
            order
            for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
            if torch.equal(both[0][:, order], both[1])
        ]
        assert fitting
        orders.add(fitting[0])
    assert len(orders) > 1
