"""Command that converts folders of posed RGB-D frames to Pointcept's tree.

```
python -m datamodules.paired_2d3d.converter captures/kitchen captures/office --root data/mine
```
Layouts of the folders: see ``frame_folders``; what is written: see ``scene_writing``. A new split
file is written after every scene, so that a run that was interrupted can go on with the rest.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from datamodules.paired_2d3d.frame_folders import FrameFolder, open_frames
from datamodules.paired_2d3d.given_clouds import load_cloud
from datamodules.paired_2d3d.scene_writing import ConversionOptions, convert_scene, write_split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from datamodules.paired_2d3d.rgbd_frames import RgbdFrame


@dataclass(frozen=True)
class _CountedFrames:
    """Frames that report each one that was passed."""

    frames: FrameFolder
    passed: Callable[[], None]

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[RgbdFrame]:
        for frame in self.frames:
            yield frame
            self.passed()


def main(args: Sequence[str] | None = None) -> None:
    """Convert the folders named on the command line.

    Args:
        args: in place of the command line's.

    Raises:
        SystemExit: with one line that says what is wrong.
    """
    parser = _parser()
    chosen = parser.parse_args(args)
    try:
        options = ConversionOptions(
            grid_size=chosen.grid_size,
            tolerance=chosen.tolerance,
            depth_range=(chosen.nearest, chosen.farthest),
            images_per_item=chosen.images_per_item,
            normal_neighbours=chosen.normal_neighbours,
            keep_depth=chosen.keep_depth,
        )
        if chosen.cloud is not None and len(chosen.folders) > 1:
            raise ValueError("--cloud: belongs to one folder; convert the folders one by one")
        for folder in chosen.folders:
            _convert(folder, chosen, options)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


def _convert(folder: Path, chosen: argparse.Namespace, options: ConversionOptions) -> None:
    """Convert one folder and say in one line what came out."""
    root: Path = chosen.root.resolve()
    scene = folder.resolve().name
    frames = open_frames(folder, chosen.gap, chosen.cloud_gap or chosen.gap)
    passes = 2 if chosen.cloud is None else 3
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"Converting {scene}", total=passes * len(frames))
        counted = _CountedFrames(frames, lambda: progress.advance(task))
        cloud = None
        if chosen.cloud is not None:
            cloud = load_cloud(chosen.cloud, counted, options.depth_tolerance)
        items = convert_scene(counted, root, chosen.split, scene, options, cloud)
    write_split(root, chosen.split, items)
    images = sum(len(item["images"]) for item in items.values())
    skipped = f"; {frames.skipped} frames without a finite pose" if frames.skipped else ""
    sys.stdout.write(f"{scene}: {len(items)} items of {images} images{skipped}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.paired_2d3d.converter",
        description="Convert folders of posed RGB-D frames to Pointcept's tree of paired data.",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        help="one folder a scene: transforms.json with depth_file_path (nerfstudio), or color, "
        "depth, pose and intrinsic (ScanNet)",
    )
    parser.add_argument("--root", type=Path, required=True, help="tree to write into")
    parser.add_argument("--split", default="train", help="train (default), val, test, ...")
    parser.add_argument("--gap", type=int, default=1, help="use every n-th frame (1)")
    parser.add_argument(
        "--cloud-gap", type=int, help="use every n-th frame for the cloud (as --gap)"
    )
    parser.add_argument("--grid-size", type=float, default=0.02, help="of the cloud, metres (0.02)")
    parser.add_argument(
        "--tolerance", type=float, help="of the depth test, metres (half the grid size, >= 0.01)"
    )
    parser.add_argument("--nearest", type=float, default=0.0, help="depth in metres (0)")
    parser.add_argument("--farthest", type=float, default=100.0, help="depth in metres (100)")
    parser.add_argument("--images-per-item", type=int, default=4, help="at most (4)")
    parser.add_argument(
        "--normal-neighbours",
        type=int,
        default=0,
        help="fit normals to so many points of the cloud (0: take them from the depth maps)",
    )
    parser.add_argument("--keep-depth", action="store_true", help="write depth maps as well")
    parser.add_argument(
        "--cloud",
        type=Path,
        help="PLY, LAS or npz file of the scene's points, in place of a new one",
    )
    return parser


if __name__ == "__main__":
    main()
