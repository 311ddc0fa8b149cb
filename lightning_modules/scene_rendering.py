"""Render a stored CLiFT scene along a camera path, without the pictures it was made from.

    python -m lightning_modules.scene_rendering --scene scene.safetensors --checkpoint RUN \
        --camera_path path.json --out frames

The cameras are given in the world of the capture; the file knows the way to the normalised one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.multiview.camera_paths import read_path
from datamodules.multiview.poses import interpolate_poses, move_poses
from lightning_modules.animation import HOW_TO_GET_MP4, check_speed, write_animation
from lightning_modules.cli.checkpoint_files import weights_file
from models.clift.checkpoint import has_condenser, load_clift, read_checkpoint, shape_of
from models.clift.clift import Clift, CliftShape
from models.clift.rays import plucker_rays
from models.clift.scene_file import StoredScene, load_scene, network_identity
from models.clift.selection import nearest_tokens, score_for_views


class PathCameras(NamedTuple):
    """Pinhole cameras of T frames in the normalised world.

    Attributes:
        pose: (T, 4, 4) float32, camera to world, OpenCV axes.
        intrinsics: (T, 4) float32, fx, fy, cx, cy in pixels of a stored scene's views.
    """

    pose: Tensor
    intrinsics: Tensor


def load_network(path: Path) -> Clift:
    """Read a network for evaluation.

    Args:
        path: A checkpoint, ours or a released one, or a run directory.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It holds no whole CLiFT network.
    """
    file = weights_file(path)
    state = read_checkpoint(file)
    network = Clift(_recorded_shape(file) or shape_of(state), condense=has_condenser(state))
    load_clift(network, state)
    return network.eval()


def _recorded_shape(file: Path) -> CliftShape | None:
    """Shape among the hyper-parameters of a checkpoint of ours; weights do not show all of it."""
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        return CliftShape(**content["hyper_parameters"]["shape"])
    except Exception:  # a released checkpoint, or bare weights
        return None


def path_cameras(scene: StoredScene, camera_path: Path | None, frames: int) -> PathCameras:
    """Cameras to render a scene from.

    Args:
        scene: Stored scene.
        camera_path: JSON {"frames": [{"transform_matrix": 4 x 4}]} in the world of the capture,
            OpenGL axes as in transforms.json, whose cameras get the intrinsics of the first
            context view; None goes from context view to context view.
        frames: Cameras between the context views.

    Raises:
        DataError: The file is no camera path.
        ValueError: The scene does not say how its world was normalised.
    """
    known = scene.intrinsics.double().numpy()
    if camera_path is None:
        pose = interpolate_poses(scene.pose.double().numpy(), frames)
        place = np.linspace(0, len(known) - 1, frames)
        columns = [np.interp(place, np.arange(len(known)), column) for column in known.T]
        intrinsics = np.stack(columns, axis=1)
    else:
        similarity = scene.normalisation.double().numpy()
        if not np.linalg.det(similarity[:3, :3]) > 0:
            raise ValueError(
                "normalisation: expected a similarity; store the scene anew by predict"
            )
        pose = move_poses(read_path(camera_path), similarity)
        intrinsics = np.repeat(known[:1], len(pose), axis=0)
    return PathCameras(torch.from_numpy(pose).float(), torch.from_numpy(intrinsics).float())


@torch.no_grad()
def render_scene(
    network: Clift,
    scene: StoredScene,
    cameras: PathCameras,
    tokens: int | None = None,
    chunk: int = 8,
) -> Tensor:
    """Render a stored scene on the network's device.

    Args:
        network: The one that made the tokens.
        scene: Stored scene of K tokens.
        cameras: T of them.
        tokens: Render each frame from so many of the tokens, those nearest to it; None takes all.
        chunk: Frames rendered at a time.

    Returns:
        (T, 3, H, W) in (0, 1), float32.

    Raises:
        ValueError: ``tokens`` is out of range.
    """
    stored = len(scene.tokens)
    if tokens is not None and not 1 <= tokens <= stored:
        raise ValueError(
            f"tokens={tokens}: must be from 1 to the {stored} stored tokens (--tokens)"
        )
    device = next(network.parameters()).device
    memory = network.remember(scene.tokens[None].to(device))
    where = (scene.rays[None].to(device), scene.camera[None].to(device))
    size = (scene.height, scene.width)
    frames = []
    for start in range(0, len(cameras.pose), chunk):
        pose, intrinsics = (part[None, start : start + chunk].to(device) for part in cameras)
        used = memory
        if tokens is not None:
            used = memory.take(
                nearest_tokens(score_for_views(*where, intrinsics, pose, *size), tokens)
            )
        frames.append(network.render_memory(used, plucker_rays(intrinsics, pose, *size))[0].cpu())
    return torch.cat(frames)


def main(arguments: Sequence[str] | None = None) -> None:
    """Render a stored scene; see ``--help``."""
    options = _parser().parse_args(arguments)
    try:
        if options.frames < 1 or options.chunk < 1:
            raise ValueError(f"frames={options.frames}, chunk={options.chunk}: must be >= 1")
        check_speed(options.frames_per_second)
        network = load_network(options.checkpoint)
        scene = load_scene(options.scene, network_identity(network))
        cameras = path_cameras(scene, options.camera_path, options.frames)
        network = network.to(options.device)
        pictures = render_scene(network, scene, cameras, options.tokens, options.chunk)
        has_mp4 = write_animation(options.out, pictures, options.frames_per_second)
    except (ValueError, OSError) as error:
        _parser().exit(1, f"{' '.join(str(error).split())}\n")
    print(
        f"{options.out}: {len(pictures)} frames from {options.tokens or len(scene.tokens)} tokens"
    )
    if not has_mp4:
        print(HOW_TO_GET_MP4)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_modules.scene_rendering",
        description="Render a stored CLiFT scene along a camera path.",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--scene", type=Path, required=True, help="scene.safetensors of predict")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="checkpoint or run that made the scene"
    )
    parser.add_argument(
        "--camera_path",
        type=Path,
        help='JSON {"frames": [{"transform_matrix": 4 x 4}]} in the world of the capture, OpenGL '
        "axes as in transforms.json; without it from context view to context view",
    )
    parser.add_argument("--out", type=Path, default=Path("frames"), help="folder to write")
    parser.add_argument("--tokens", type=int, help="render each frame from so many tokens (all)")
    parser.add_argument("--frames", type=int, default=60, help="frames between context views")
    parser.add_argument("--chunk", type=int, default=8, help="frames rendered at a time")
    parser.add_argument("--frames_per_second", type=float, default=15.0, help="at most 50")
    parser.add_argument("--device", default=device, help="cpu, cuda, cuda:1, ...")
    return parser


if __name__ == "__main__":
    main()
