"""Posed RGB-D frames of one scene to Pointcept's tree: cloud, images, cameras, correspondences.

```
<root>/<split>/<scene>/{coord,color,normal}.npy, segment.npy and instance.npy if there are labels
<root>/images/<split>/<scene>/{color/*.png, intrinsic/*.npy, pose/*.npy, correspondence/*.npy}
<root>/images/<split>/<scene>/depth/*.png                     uint16 millimetres, if wanted
<root>/splits/<split>.json                                    items of up to four images
```
A correspondence file holds rows (u = column, v = row, point) of whole pixels, or one row of -1
where the image shows no point. Intrinsics count pixel centres as whole numbers, as ScanNet's do;
poses are camera to world with OpenCV axes.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import DataError
from datamodules.paired_2d3d.cloud_fusion import Cloud, CloudFusion
from datamodules.paired_2d3d.normals import neighbour_normals
from datamodules.paired_2d3d.visibility import Sightings, find_visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from datamodules.paired_2d3d.rgbd_frames import FrameSource, RgbdFrame

SceneItems = dict[str, dict[str, str | list[str]]]
"""Items of a split file by their keys: pointclouds, images and correspondences."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_EXACT_FLOAT32 = 1 << 24  # whole numbers below this are exact as float32
_COMPRESSION = 3  # of PNG files


@dataclass(frozen=True)
class ConversionOptions:
    """How a scene is converted.

    Attributes:
        grid_size: side of the cells that get one point each, metres.
        tolerance: largest difference of depths at which an image shows a point, metres; None is
            half the grid size and at least 1 cm, which the paper uses at 2 cm.
        depth_range: nearest and farthest depth that adds to the cloud, metres.
        images_per_item: images of an item at most.
        normal_neighbours: points that a normal is fitted to; 0 takes normals from the depth maps.
        keep_depth: whether depth maps are written as well.

    Raises:
        ValueError: if a value is out of range.
    """

    grid_size: float = 0.02
    tolerance: float | None = None
    depth_range: tuple[float, float] = (0.0, 100.0)
    images_per_item: int = 4
    normal_neighbours: int = 0
    keep_depth: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.grid_size < np.inf:
            raise ValueError(f"grid_size={self.grid_size}: must be > 0; give metres, such as 0.02")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance={self.tolerance}: must be > 0; give metres, such as 0.01")
        if not 0 <= self.depth_range[0] < self.depth_range[1]:
            raise ValueError(
                f"depth_range={self.depth_range}: must be 0 <= nearest < farthest; give metres"
            )
        if self.images_per_item < 1:
            raise ValueError(f"images_per_item={self.images_per_item}: must be >= 1; 4 is usual")
        if self.normal_neighbours != 0 and self.normal_neighbours < 3:
            raise ValueError(
                f"normal_neighbours={self.normal_neighbours}: must be 0 or >= 3; 12 is usual"
            )

    @property
    def depth_tolerance(self) -> float:
        """Tolerance of the depth test, metres."""
        return max(0.01, self.grid_size / 2) if self.tolerance is None else self.tolerance


def convert_scene(
    frames: FrameSource | Sequence[RgbdFrame],
    root: Path,
    split: str,
    scene: str,
    options: ConversionOptions,
    cloud: Cloud | None = None,
) -> SceneItems:
    """Write one scene into a tree; its items still have to be given to ``write_split``.

    Args:
        frames: of the scene in order; passed twice.
        root: of the tree; its name is taken as the name of the data set.
        split: such as train.
        scene: its name.
        options: how to convert.
        cloud: of the scene if there is one already; None fuses the depth maps.

    Returns:
        Items ``<scene>_<k>`` of consecutive frames; the last may have fewer images.

    Raises:
        DataError: if the frames cannot be used.
    """
    for name, value in (("split", split), ("scene", scene)):
        if not _NAME.fullmatch(value):
            raise DataError(
                f"{name}={value!r}: must be letters, digits, '_', '-' and '.'; rename it"
            )
    folders = root / split / scene, root / "images" / split / scene
    for folder in folders:
        if folder.exists():
            raise DataError(f"{folder}: exists already; remove it, or choose another name")
    try:
        cloud = fuse_frames(frames, options) if cloud is None else cloud
        folders[0].mkdir(parents=True)
        for field, values in cloud._asdict().items():
            if values is not None:
                np.save(folders[0] / f"{field}.npy", values)
        return _write_images(frames, root, split, scene, options, cloud)
    except BaseException:
        # Half a scene would stand in the way of the next attempt.
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def fuse_frames(frames: FrameSource | Sequence[RgbdFrame], options: ConversionOptions) -> Cloud:
    """The cloud of all frames that are meant for it, with one point a cell of the grid.

    Raises:
        DataError: if no pixel has a depth.
    """
    fusion = CloudFusion(options.grid_size, options.depth_range)
    for frame in frames:
        if frame.in_cloud:
            fusion.add(frame)
    cloud = fusion.finish()
    if options.normal_neighbours == 0:
        return cloud
    normal = neighbour_normals(
        cloud.coord.astype(np.float64), cloud.normal.astype(np.float64), options.normal_neighbours
    )
    return cloud._replace(normal=normal.astype(np.float32))


def write_split(root: Path, split: str, items: SceneItems) -> None:
    """Write a split file; items of scenes that it names already are replaced.

    Raises:
        DataError: if the file exists and cannot be read.
    """
    path = root / "splits" / f"{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    merged: SceneItems = {}
    if path.is_file():
        try:
            merged = json.loads(path.read_bytes())
            clouds = {item["pointclouds"] for item in items.values()}
            merged = {k: item for k, item in merged.items() if item["pointclouds"] not in clouds}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}: no split file ({error!r}); repair or remove it") from error
    path.write_text(json.dumps(merged | items, indent=1))


def _write_images(
    frames: FrameSource | Sequence[RgbdFrame],
    root: Path,
    split: str,
    scene: str,
    options: ConversionOptions,
    cloud: Cloud,
) -> SceneItems:
    """Write images, cameras and correspondences, and put them together to items."""
    folder = root / "images" / split / scene
    kinds = ["color", "intrinsic", "pose", "correspondence"]
    for kind in kinds + ["depth"] * options.keep_depth:
        (folder / kind).mkdir(parents=True)
    coord = cloud.coord.astype(np.float64)
    names: list[str] = []
    for frame in frames:
        if not frame.in_items:
            continue
        if not _NAME.fullmatch(frame.name) or frame.name in names:
            raise DataError(f"frame {frame.name!r} of {scene}: no name of its own; rename it")
        names.append(frame.name)
        _write_frame(folder, frame, options.keep_depth)
        sightings = find_visible(coord, frame, options.depth_tolerance)
        np.save(folder / "correspondence" / f"{frame.name}.npy", _rows(sightings))
    return _items(f"data/{root.name}", split, scene, names, options.images_per_item)


def _items(dataset: str, split: str, scene: str, names: list[str], size: int) -> SceneItems:
    images = f"{dataset}/images/{split}/{scene}"
    return {
        f"{scene}_{block}": {
            "pointclouds": f"{dataset}/{split}/{scene}",
            "images": [f"{images}/color/{name}.png" for name in chosen],
            "correspondences": [f"{images}/correspondence/{name}.npy" for name in chosen],
        }
        for block, chosen in enumerate(_blocks(names, size))
    }


def _blocks(names: list[str], size: int) -> Iterable[list[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))


def _write_frame(folder: Path, frame: RgbdFrame, keep_depth: bool) -> None:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(frame.colour))
    picture.save(folder / "color" / f"{frame.name}.png", compress_level=_COMPRESSION)
    intrinsics = frame.intrinsics - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    np.save(folder / "intrinsic" / f"{frame.name}.npy", intrinsics)
    np.save(folder / "pose" / f"{frame.name}.npy", frame.pose)
    if keep_depth:
        millimetres = np.rint(np.clip(frame.depth * 1000, 0, 65535)).astype(np.uint16)
        depth = Image.fromarray(millimetres)
        depth.save(folder / "depth" / f"{frame.name}.png", compress_level=_COMPRESSION)


def _rows(sightings: Sightings) -> NDArray[np.floating]:
    """Rows (u, v, point) of a correspondence file."""
    if len(sightings.point) == 0:
        return np.full((1, 3), -1, dtype=np.float32)
    exact = sightings.point[-1] < _EXACT_FLOAT32
    rows = np.column_stack((sightings.pixel, sightings.point))
    return rows.astype(np.float32 if exact else np.float64)
