"""The released folder ``flux_controlnet``: config.json and safetensors, whole or in parts.

The release states neither the width of the latents nor the scale, both are read off the weights.
Nothing in the files is executed, and no file outside the folder is opened. Headers are compared
with the network before a single weight is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.bifrost.controlnet import LatentFluxControlNet
from models.bifrost.resampler import SCALES

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
_JSON_BYTES = 4_000_000
_PART_LIMIT = 512
_REMEDY = "download flux_controlnet of hanlincs/Bifrost-1 again"
# Largest accepted sizes: far beyond any FLUX, small enough to build no giant by mistake.
_LIMITS = {
    "latent_channels": 65536,
    "patch_size": 16,
    "in_channels": 4096,
    "num_layers": 128,
    "num_single_layers": 128,
    "attention_head_dim": 1024,
    "num_attention_heads": 256,
    "joint_attention_dim": 65536,
    "pooled_projection_dim": 65536,
}
# Entries of diffusers' own class that must be empty, and entries that say nothing about sizes.
_EMPTY = ("num_mode", "conditioning_embedding_channels")
_TYPES = ("F32", "F16", "BF16", "I64")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def read_controlnet(folder: Path, dtype: torch.dtype | None = None) -> LatentFluxControlNet:
    """Read a ControlNet, released or ours, on the CPU and in evaluation mode.

    Args:
        folder: ``flux_controlnet`` with its configuration and weights.
        dtype: Type of the weights; None keeps that of the file. BatchNorm's counter stays int64.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, names another file outside the folder, or does not fit the
            configuration; the message is one line.
    """
    config = _read_sizes(folder / CONFIG_FILE)
    parts = _find_parts(folder)
    shapes = {key: shape for path in parts for key, shape in _header(path)}
    if "latent_channels" not in config:
        config["latent_channels"] = _width(folder, shapes)
    try:
        with torch.device("meta"):
            controlnet: LatentFluxControlNet = LatentFluxControlNet(**config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: impossible sizes ({_line(error)})") from None
    expected = {key: tuple(value.shape) for key, value in controlnet.state_dict().items()}
    _check_keys(folder, shapes, expected)
    for path in parts:
        state = dict(_weights(path, dtype))
        controlnet.load_state_dict(state, strict=False, assign=True)
    return controlnet.requires_grad_(True).eval()


def export_controlnet(
    controlnet: LatentFluxControlNet, folder: Path, part_bytes: int = 10_000_000_000
) -> None:
    """Write a ControlNet in the layout of the release.

    With scale 2 the configuration is the release's own, which official code reads; with another
    it also states width and scale. Every file appears under its name only when whole.

    Args:
        controlnet: On any device.
        folder: Made if it does not exist.
        part_bytes: Size at which weights are split into parts.

    Raises:
        ValueError: The folder holds a ControlNet already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE)):
        raise ValueError(f"folder={folder}: holds a ControlNet already; choose another")
    state = {k: v.detach().cpu().contiguous() for k, v in controlnet.state_dict().items()}
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern=_PATTERN, max_shard_size=part_bytes
    )
    for name, keys in plan.filename_to_tensors.items():
        temporary = folder / f".{name}.tmp"
        save_file({key: state[key] for key in keys}, temporary, {"format": "pt"})
        os.replace(temporary, folder / name)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / INDEX_FILE, index)
    config: dict[str, Any] = {"_class_name": "FluxControlNetModel"}
    config |= {k: v for k, v in controlnet.config.items() if not k.startswith("_")}
    config |= dict.fromkeys(_EMPTY)
    if config["scale"] == 2:
        config = {k: v for k, v in config.items() if k not in ("scale", "latent_channels")}
    _write_json(folder / CONFIG_FILE, config)


def _read_sizes(path: Path) -> dict[str, Any]:
    """Sizes that a configuration states, every one of the right type and magnitude."""
    config = _read_json(path)
    for name in _EMPTY:
        if config.get(name) is not None:
            raise ValueError(
                f"{path}: {name}={config[name]!r}"[:150]
                + ": union and pixel ControlNets take no latents; use Bifrost's"
            )
    sizes = {name: config[name] for name in _LIMITS if name in config}
    for name, size in sizes.items():
        whole = isinstance(size, int) and not isinstance(size, bool)
        if not whole or not (0 if "layers" in name else 1) <= size <= _LIMITS[name]:
            raise ValueError(f"{path}: {name}={str(size)[:40]}: expected 1 .. {_LIMITS[name]}")
    guidance, axes = config.get("guidance_embeds", False), config.get("axes_dims_rope")
    if not isinstance(guidance, bool):
        raise ValueError(f"{path}: guidance_embeds={str(guidance)[:40]}: expected true or false")
    sizes["guidance_embeds"] = guidance
    if axes is not None:
        sizes["axes_dims_rope"] = _checked_axes(path, axes)
    if "scale" in config:
        sizes["scale"] = _checked_scale(path, config["scale"])
    return sizes


def _checked_axes(path: Path, axes: object) -> tuple[int, ...]:
    found = axes if isinstance(axes, list) else []
    if len(found) != 3 or not all(type(a) is int and 0 < a <= 1024 and a % 2 == 0 for a in found):
        raise ValueError(f"{path}: axes_dims_rope={str(axes)[:40]}: expected three even numbers")
    return tuple(found)


def _checked_scale(path: Path, scale: object) -> float:
    if not isinstance(scale, int | float) or isinstance(scale, bool) or scale not in SCALES:
        raise ValueError(f"{path}: scale={str(scale)[:40]}: expected 0.5, 1 or 2")
    return float(scale)


def _find_parts(folder: Path) -> list[Path]:
    """Weight files of a folder, by its index if there is one."""
    if (folder / INDEX_FILE).is_file():
        index = _read_json(folder / INDEX_FILE)
        listed = index.get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{folder / INDEX_FILE}: has no weight_map; {_REMEDY}")
        names = sorted({str(name) for name in listed.values()})
        for name in names:
            if name != Path(name).name or not name.endswith(".safetensors"):
                raise ValueError(
                    f"{folder / INDEX_FILE}: names {name[:80]!r}, which is no safetensors file of "
                    "this folder; do not trust it"
                )
        if len(names) > _PART_LIMIT:
            raise ValueError(f"{folder / INDEX_FILE}: {len(names)} parts, at most {_PART_LIMIT}")
    else:
        names = [WEIGHTS_FILE]
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: there is no such file; {_REMEDY}")
    return [folder / name for name in names]


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a file's tensors, without reading them."""
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                entry = file.get_slice(key)
                if entry.get_dtype() not in _TYPES:
                    raise ValueError(f"{path}: {key} is of type {entry.get_dtype()}; {_REMEDY}")
                yield key, tuple(entry.get_shape())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is damaged ({_line(error)}); {_REMEDY}") from None


def _weights(path: Path, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file, cast and finite."""
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                value: Tensor = file.get_tensor(key)
                counter = key.endswith("num_batches_tracked")
                if counter != (value.dtype not in _FLOATS):
                    raise ValueError(f"{path}: {key} is of type {value.dtype}; {_REMEDY}")
                if not bool(torch.isfinite(value).all()):
                    raise ValueError(f"{path}: {key} is not finite; {_REMEDY}")
                yield key, value if counter or dtype is None else value.to(dtype)
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged ({_line(error)}); {_REMEDY}") from None


def _width(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Width of the latents by the weights."""
    shape = shapes.get("controlnet_x_embedder.weight", ())
    if len(shape) != 2 or "up_sampling_block.upconv.weight" not in shapes:
        raise ValueError(
            f"folder={folder}: no ControlNet of Bifrost, controlnet_x_embedder or "
            f"up_sampling_block is missing; {_REMEDY}"
        )
    if not 0 < shape[1] <= _LIMITS["latent_channels"]:
        raise ValueError(f"folder={folder}: latents of width {shape[1]}; {_REMEDY}")
    return shape[1]


def _check_keys(
    folder: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    wrong = [key for key in (*expected, *found) if found.get(key) != expected.get(key)]
    if wrong:
        mine, theirs = expected.get(wrong[0], "nothing"), found.get(wrong[0], "nothing")
        raise ValueError(
            f"folder={folder}: {len(set(wrong))} weights do not fit config.json, first "
            f"{wrong[0][:80]}: the file has {theirs}, the network {mine}; {_REMEDY}"
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; {_REMEDY}")
    if path.stat().st_size > _JSON_BYTES:
        raise ValueError(f"{path}: larger than {_JSON_BYTES} bytes; {_REMEDY}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: is damaged or no JSON; {_REMEDY}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object; {_REMEDY}")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:150]
