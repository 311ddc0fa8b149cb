"""A scene as a file: its tokens and cameras, enough to render it later without its pictures.

The file is in the safetensors format: nothing in it is ever executed, and it holds tensors and
text only.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.clift.clift import Clift

_FORMAT, _VERSION = "quintet-clift-scene", "2"
_HALF_LIMIT = torch.finfo(torch.float16).max
# Dimensions of each tensor: K tokens, C channels, V context views.
_DIMENSIONS: dict[str, tuple[str | int, ...]] = {
    "tokens": ("K", "C"),
    "rays": ("K", 6),
    "camera": ("K", 3),
    "pose": ("V", 4, 4),
    "intrinsics": ("V", 4),
    "distortion": ("V", 4),
    "normalisation": (4, 4),
}


@dataclass(frozen=True)
class StoredScene:
    """One scene: K tokens of width C made from V context views.

    Attributes:
        tokens: (K, C) float32, what the renderer attends to.
        rays: (K, 6) Plücker ray [o x d, d] through the centre of each token's patch, for selection.
        camera: (K, 3) centre of each token's camera.
        pose: (V, 4, 4) context cameras to the normalised world, OpenCV axes.
        intrinsics: (V, 4) fx, fy, cx, cy in pixels of a ``height`` x ``width`` picture.
        distortion: (V, 4) k1, k2, p1, p2; zeros for pinhole cameras.
        normalisation: (4, 4) similarity from the world of the capture to the normalised one.
        height: Height in pixels of a rendered view.
        width: Width in pixels of a rendered view.
        network: What ``network_identity`` gave for the network that made the tokens.
        notes: Anything else worth keeping, as text by name.
    """

    tokens: Tensor
    rays: Tensor
    camera: Tensor
    pose: Tensor
    intrinsics: Tensor
    distortion: Tensor
    normalisation: Tensor
    height: int
    width: int
    network: str
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def megabytes(self) -> float:
        """Size of the tokens as the paper counts it: 4 bytes a number, 10^6 bytes a MB."""
        return self.tokens.numel() * 4 / 1e6


def network_identity(network: nn.Module) -> str:
    """SHA-256 of a network's weights, names and shapes: tokens fit only the network they are of."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encoder_identity(network: Clift) -> str:
    """Identity of the part that stage 2 freezes, to which stored clusters belong."""
    return network_identity(nn.ModuleList(network.encoder_modules()))


def save_scene(path: Path, scene: StoredScene, half: bool = False) -> float:
    """Write a scene; the file appears under its name only when whole.

    Args:
        path: File to write, ``.safetensors`` by custom.
        scene: Its tensors on any device.
        half: Store the tokens in float16, half the size; cameras and rays stay float32.

    Returns:
        Size of the file in MB (10^6 bytes), cameras and rays included.

    Raises:
        ValueError: Shapes that do not fit, numbers that are not finite, or tokens beyond float16.
    """
    tensors = {name: getattr(scene, name).detach().cpu().float() for name in _DIMENSIONS}
    _check_tensors(path, tensors)
    if half:
        largest = float(tensors["tokens"].abs().max())
        if largest > _HALF_LIMIT:
            raise ValueError(
                f"{path}: a token holds {largest:.4g}, float16 reaches {_HALF_LIMIT:.0f}; "
                "store this scene in float32 (half=False)"
            )
        tensors["tokens"] = tensors["tokens"].half()
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "height": str(scene.height),
        "width": str(scene.width),
        "network": scene.network,
        "notes": json.dumps(dict(scene.notes)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size / 1e6


def load_scene(path: Path, network: str | None = None) -> StoredScene:
    """Read a scene, tokens in float32.

    Args:
        path: File written by ``save_scene``.
        network: Identity of the network that is to render it; None renders with any.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, no scene, or of another network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a scene saved by CLiFT's predict")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: incomplete, damaged or no scene ({error})") from None
    if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(f"{path}: no scene of CLiFT, version {_VERSION}")
    _check_tensors(path, tensors)
    if network is not None and metadata.get("network") != network:
        raise ValueError(
            f"{path}: made by network {metadata.get('network', '')[:12]}, to be rendered by "
            f"{network[:12]}; load the checkpoint that made it"
        )
    try:
        height, width = int(metadata["height"]), int(metadata["width"])
        notes = {str(k): str(v) for k, v in json.loads(metadata["notes"]).items()}
        stored_network = metadata["network"]
    except (KeyError, ValueError, AttributeError):
        raise ValueError(f"{path}: its size, network or notes cannot be read") from None
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    return StoredScene(**floats, height=height, width=width, network=stored_network, notes=notes)


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless all tensors are there, fit each other and are finite."""
    if tensors.keys() != _DIMENSIONS.keys():
        names = sorted(tensors.keys() ^ _DIMENSIONS.keys())
        raise ValueError(f"{path}: tensors missing or unknown: {', '.join(names)}")
    sizes: dict[str, int] = {}
    for name, dimensions in _DIMENSIONS.items():
        tensor = tensors[name]
        fits = tensor.ndim == len(dimensions) and tensor.is_floating_point()
        for wanted, size in zip(dimensions, tensor.shape, strict=False):
            expected = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
            fits &= size == expected and size > 0
        if not fits:
            described = ", ".join(str(sizes.get(str(d), d)) for d in dimensions)
            raise ValueError(f"{path}: {name} of shape {tuple(tensor.shape)}, not ({described})")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
