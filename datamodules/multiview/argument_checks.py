"""Checks of MultiviewRays' arguments against their ranges, and what "auto" stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from datamodules.argument_ranges import check_least, check_shares, refuse
from datamodules.multiview.augmentation import Augmentation
from datamodules.multiview.view_sampler import ViewSampling

if TYPE_CHECKING:
    from datamodules.multiview.multiview import MultiviewRays
    from datamodules.multiview.readers.detection import Layout

_AT_LEAST = {
    "image_size": 1,
    "image_width": 1,
    "target_views": 1,
    "hold_out_every": 0,
    "batch_size": 1,
    "eval_batch_size": 1,
    "num_workers": 0,
    "cache_decoded_mb": 0,
    "path_frames": 1,
    "predict_count": 1,
    "seed": 0,
}
# The embedded scenes have two candidate views in each quadrant of the camera area.
_PROCEDURAL_GROUPS = ((0, 1), (2, 3), (4, 5), (6, 7))


def check_arguments(data: MultiviewRays) -> None:
    """Compare the arguments with their ranges.

    Raises:
        ValueError: one line naming the argument, its value and what was expected.
        FileNotFoundError: if a path leads nowhere.
    """
    check_least(data, _AT_LEAST)
    if not 1 <= data.context_views[0] <= data.context_views[1]:
        refuse(data, "context_views", "must be the fewest and the most views, the fewest >= 1")
    if data.hold_out_every == 1:
        refuse(data, "hold_out_every", "would hold out every frame; must be 0 (none) or >= 2")
    check_shares(data, "max_skipped_share")
    if min(data.procedural_scenes) < 1:
        refuse(data, "procedural_scenes", "must be two numbers >= 1: training and test scenes")
    if data.root is None and data.image_width != data.image_size:
        refuse(data, "image_width", "the embedded scenes are square; leave it out or give a root")
    if data.root is None and data.views.mode == "auto" and data.context_views != (4, 4):
        refuse(
            data, "context_views", "the embedded scenes have 4, unless data.init_args.views is set"
        )
    if data.clusters is not None and data.augmentation != Augmentation():
        refuse(data, "augmentation", "stored clusters are of the unchanged pictures; turn it off")
    _check_paths(data)


def _check_paths(data: MultiviewRays) -> None:
    if data.root is not None and not data.root.is_dir():
        from datamodules.multiview.readers.detection import LOOKED_FOR

        raise FileNotFoundError(
            f"data.init_args.root={data.root}: no such folder; expected a folder with "
            f"{LOOKED_FOR}; correct the path, or leave root out to use the embedded scenes"
        )
    for name in ("evaluation_index", "camera_path"):
        path = getattr(data, name)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"data.init_args.{name}={path}: no such file; correct the path")


def resolve_sampling(data: MultiviewRays, layout: Layout) -> ViewSampling:
    """How views are drawn, with mode auto replaced by the mode that suits the data.

    Raises:
        ValueError: if the groups are more than the context views.
    """
    views = data.views
    if views.mode == "auto" and data.root is None:
        views = replace(views, mode="groups", groups=_PROCEDURAL_GROUPS)
    elif views.mode == "auto":
        is_capture = layout in ("transforms", "colmap")
        views = replace(views, mode="spread" if is_capture else "bounded")
    if views.mode == "groups" and len(views.groups) > data.context_views[1]:
        refuse(data, "context_views", f"must allow {len(views.groups)}, one of each views.groups")
    return views
