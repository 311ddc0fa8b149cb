"""Files of the demo's frozen foundations: small weights, each beside a record of how it was made.

A part is ``NAME.safetensors`` in float16 and ``NAME.json`` with its sizes, the digest of the
weights, the recipe of its training and the figures it reached. Both hold numbers and text only;
nothing in them is executed or opened as a path.

Example:
    >>> foundations = load_foundations()
    >>> ids, mask = foundations.tokenizer.encode(["red heart"])
    >>> foundations.tower.shape.tokens
    16
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import Qwen2_5_VLTextModel

from models.bifrost.demo_foundations import FluxShape, VaeShape, build_flux, build_vae
from models.bifrost.demo_tokenizer import DemoTokenizer, load_tokenizer
from models.bifrost.demo_tower import (
    DemoLanguageShape,
    DemoTower,
    TowerShape,
    build_language_model,
    build_tower,
)

SHIPPED = Path(__file__).parent / "foundations"
TOWER, LANGUAGE, VAE, FLUX = "tower", "language_model", "vae", "flux"
TOKENIZER_FILE = "tokenizer.json"
_FORMAT, _VERSION = "quintet-bifrost-foundation", 1
_RECORD_BYTES, _WEIGHTS_BYTES = 65_536, 256_000_000
_LARGEST = 65_536
_REMEDY = "train it with configs/bifrost/demo_*.yaml"

Shape = TypeVar("Shape", TowerShape, DemoLanguageShape, VaeShape, FluxShape)
Network = TypeVar("Network", bound=nn.Module)


class Foundations(NamedTuple):
    """Frozen networks the demo stands on, in evaluation mode and float32.

    Attributes:
        tokenizer: Of the captions.
        language_model: Text part of a small Qwen2.5-VL.
        tower: Vision tower whose output are the latents.
        vae: Autoencoder.
        flux: Base FLUX.
    """

    tokenizer: DemoTokenizer
    language_model: Qwen2_5_VLTextModel
    tower: DemoTower
    vae: AutoencoderKL
    flux: FluxTransformer2DModel


def load_foundations(folder: Path = SHIPPED) -> Foundations:
    """Read all parts.

    Args:
        folder: Where they are; the shipped ones by default.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or does not fit another.
    """
    return Foundations(
        load_tokenizer(folder / TOKENIZER_FILE),
        load_language_model(folder),
        load_tower(folder),
        load_vae(folder),
        load_flux(folder),
    )


def load_tower(folder: Path = SHIPPED) -> DemoTower:
    """Read the vision tower, see `load_foundations`."""
    return _load(folder, TOWER, TowerShape(), build_tower)


def load_language_model(folder: Path = SHIPPED) -> Qwen2_5_VLTextModel:
    """Read the language model, see `load_foundations`."""
    return _load(folder, LANGUAGE, DemoLanguageShape(), build_language_model)


def load_vae(folder: Path = SHIPPED) -> AutoencoderKL:
    """Read the autoencoder, see `load_foundations`."""
    return _load(folder, VAE, VaeShape(), build_vae)


def load_flux(folder: Path = SHIPPED) -> FluxTransformer2DModel:
    """Read the base FLUX, see `load_foundations`."""
    return _load(folder, FLUX, FluxShape(), build_flux)


def save_part(
    folder: Path,
    name: str,
    network: nn.Module,
    shape: TowerShape | DemoLanguageShape | VaeShape | FluxShape,
    recipe: Mapping[str, str | int | float],
    figures: Mapping[str, float],
) -> None:
    """Write a part; each file appears under its name only when whole.

    Args:
        folder: Made if it does not exist.
        name: One of `TOWER`, `LANGUAGE`, `VAE`, `FLUX`.
        network: Trained, on any device.
        shape: Its sizes.
        recipe: How it was trained: data, steps, batch, learning rate, seed.
        figures: What it reached.

    Raises:
        ValueError: A weight is not finite in float16.
    """
    state = {k: _storable(folder / name, k, v) for k, v in network.state_dict().items()}
    weights = save(state, {"format": _FORMAT})
    record = {
        "format": _FORMAT,
        "version": _VERSION,
        "part": name,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "shape": asdict(shape),
        "recipe": dict(recipe),
        "figures": dict(figures),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{name}.safetensors", weights)
    _write(folder / f"{name}.json", (json.dumps(record, indent=2) + "\n").encode())


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """Sizes, recipe and figures of a part, as `save_part` wrote them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, of another kind or of another version.
    """
    path = folder / f"{name}.json"
    text = _read(path, _RECORD_BYTES)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: is damaged or no JSON; {_REMEDY}") from None
    kind = {"format": _FORMAT, "version": _VERSION, "part": name}
    if not isinstance(record, dict) or any(record.get(key) != kind[key] for key in kind):
        raise ValueError(f"{path}: no record of part {name!r}, version {_VERSION}; {_REMEDY}")
    return record


def _load(folder: Path, name: str, default: Shape, build: Callable[[Shape], Network]) -> Network:
    """Read a part, frozen. A network is built only if the weights have its shapes."""
    record = read_record(folder, name)
    path = folder / f"{name}.safetensors"
    weights = _read(path, _WEIGHTS_BYTES)
    if hashlib.sha256(weights).hexdigest() != record.get("weights_sha256"):
        raise ValueError(f"{path}: is not the file that {name}.json describes; {_REMEDY}")
    shape = _checked_shape(folder / f"{name}.json", record.get("shape"), default)
    try:
        state = {key: value.float() for key, value in load(weights).items()}
        with torch.device("meta"):
            expected = {k: v.shape for k, v in build(shape).state_dict().items()}
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:150]}; {_REMEDY}") from None
    if {key: value.shape for key, value in state.items()} != expected:
        raise ValueError(f"{path}: weights do not fit the sizes in {name}.json; {_REMEDY}")
    with torch.random.fork_rng(devices=[]):  # a start that is overwritten uses no randomness
        network = build(shape)
    network.load_state_dict(state)
    return network.requires_grad_(False).eval()


def _checked_shape(path: Path, stated: object, default: Shape) -> Shape:
    """Sizes of a record, each of the type of the default's and of sane magnitude."""
    names = {field.name for field in fields(default)}
    if not isinstance(stated, dict) or set(stated) != names:
        raise ValueError(f"{path}: shape must state {', '.join(sorted(names))}; {_REMEDY}")
    sizes: dict[str, Any] = {}
    for name, value in stated.items():
        usual = getattr(default, name)
        parts = value if isinstance(usual, tuple) and isinstance(value, list) else [value]
        kind = type(usual[0]) if isinstance(usual, tuple) else type(usual)
        whole = kind is int
        sound = 0 < len(parts) <= 8 and all(type(part) is kind for part in parts)
        if not sound or not all(abs(p) <= _LARGEST and (p > 0 or not whole) for p in parts):
            raise ValueError(f"{path}: {name}={str(value)[:40]}: impossible size; {_REMEDY}")
        sizes[name] = tuple(parts) if isinstance(usual, tuple) else value
    try:
        return type(default)(**sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_REMEDY}") from None


def _storable(path: Path, key: str, value: Tensor) -> Tensor:
    half = value.detach().cpu().to(torch.float16).contiguous()
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"{path}: {key} is not finite in float16; train with a lower rate")
    return half


def _read(path: Path, limit: int) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; {_REMEDY}")
    if path.stat().st_size > limit:
        raise ValueError(f"{path}: larger than {limit} bytes; {_REMEDY}")
    return path.read_bytes()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
