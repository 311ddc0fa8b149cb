"""A trained reducer as a folder: ``selector.safetensors`` and ``config.json``.

Both hold numbers and text only, nothing in them is ever executed or opened as a path. The
configuration states the digest of the weights, so that files which do not belong together, or a
single changed byte, are noticed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.token_reduction.reducer import ReducerOrigin, TokenReducer
from models.token_reduction.selector import SelectorShape

WEIGHTS_FILE = "selector.safetensors"
CONFIG_FILE = "config.json"
_FORMAT, _VERSION = "quintet-token-reducer", 1
_CONFIG_BYTES = 65536
# Largest accepted sizes: far beyond any encoder, small enough to build no giant by mistake.
_LIMITS = {"width": 65536, "heads": 1024, "layers": 256}
_KINDS: dict[str, type] = {
    "width": int,
    "heads": int,
    "layers": int,
    "mlp_ratio": float,
    "positions": str,
    "keep_bias": float,
    "encoder": str,
    "encoder_hash": str,
    "layer": int,
    "floor": float,
}


def save_reducer(folder: Path, reducer: TokenReducer) -> None:
    """Write a reducer; each file appears under its name only when whole.

    Weights are stored in float32. The reconstructor is no part of it.

    Args:
        folder: Made if it does not exist.
        reducer: On any device.

    Raises:
        ValueError: Its standardiser has seen no tokens, or a weight is not finite.
    """
    state = {name: _storable(value) for name, value in reducer.state_dict().items()}
    _check_values(folder, state)
    weights = save(state, {"format": _FORMAT})
    config = {
        "format": _FORMAT,
        "version": _VERSION,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "origin": asdict(reducer.origin),
        "selector": asdict(reducer.shape),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / WEIGHTS_FILE, weights)
    _write(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def load_reducer(folder: Path) -> TokenReducer:
    """Read a reducer, on the CPU and in evaluation mode; its scores are those it was saved with.

    Raises:
        FileNotFoundError: The folder or one of the two files is not there.
        ValueError: A file is damaged, of another format or version, or does not fit the other.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; expected a saved reducer")
    config = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    try:
        shape = SelectorShape(**config["selector"])
        origin = ReducerOrigin(**config["origin"])
        with torch.device("meta"):
            reducer = TokenReducer(shape, origin)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    state = _read_weights(path, reducer.state_dict(), config["weights_sha256"])
    _check_values(path, state)
    reducer.to_empty(device="cpu").load_state_dict(state)
    return reducer.eval()


def _read_config(path: Path) -> dict[str, Any]:
    """The configuration, every name and type in it checked."""
    if path.stat().st_size > _CONFIG_BYTES:
        raise ValueError(f"{path}: larger than {_CONFIG_BYTES} bytes; no reducer's configuration")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: incomplete, damaged or no configuration") from None
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise ValueError(f"{path}: no configuration of a token reducer")
    if config.get("version") != _VERSION:
        raise ValueError(
            f"{path}: version {str(config.get('version'))[:20]!r}, this program reads {_VERSION}"
        )
    expected = {"format", "version", "weights_sha256", "origin", "selector"}
    _check_names(path, config, expected)
    if not isinstance(config["weights_sha256"], str):
        raise ValueError(f"{path}: weights_sha256 is no text")
    _check_part(path, config["origin"], ReducerOrigin)
    _check_part(path, config["selector"], SelectorShape)
    return config


def _check_part(path: Path, part: object, kind: Callable[..., object]) -> None:
    """Raise ``ValueError`` unless a part has the fields of its dataclass, in type and size."""
    if not isinstance(part, dict):
        raise ValueError(f"{path}: a part of the configuration is missing")
    _check_names(path, part, {field.name for field in fields(kind)})  # type: ignore[arg-type]
    for name, value in part.items():
        if name == "grid":
            sound = isinstance(value, list) and [type(n) for n in value] == [int, int]
            sound = sound and all(0 < n <= 4096 for n in value)
        else:
            wanted = _KINDS[name]
            sound = type(value) is wanted or (wanted is float and type(value) is int)
            sound = sound and (name not in _LIMITS or 0 < value <= _LIMITS[name])
            sound = sound and (name != "mlp_ratio" or 0 < value <= 64)
        if not sound:
            raise ValueError(f"{path}: {name} is {str(value)[:40]!r}; refused")


def _check_names(path: Path, found: Mapping[str, object], expected: set[str]) -> None:
    wrong = sorted(found.keys() ^ expected)
    if wrong:
        names = ", ".join(name[:40] for name in wrong[:3])
        raise ValueError(f"{path}: missing or unknown in the configuration: {names!r}")


def _read_weights(path: Path, expected: Mapping[str, Tensor], digest: str) -> dict[str, Tensor]:
    """The tensors of a file, read only after names, shapes and types are those expected."""
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            wrong = sorted(names ^ expected.keys())
            if wrong:
                names_text = ", ".join(name[:40] for name in wrong[:3])
                raise ValueError(f"{path}: tensors missing or unknown: {names_text!r}")
            for name in names:
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(expected[name].shape):
                    raise ValueError(
                        f"{path}: {name} of shape {shape}, the configuration has "
                        f"{tuple(expected[name].shape)}"
                    )
            state = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: incomplete, damaged or no weights ({reason})") from None
    wrong = [name for name, value in state.items() if value.dtype != expected[name].dtype]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is {state[wrong[0]].dtype}; refused")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise ValueError(f"{path}: damaged, or not the weights of the {CONFIG_FILE} beside it")
    return state


def _check_values(path: Path, state: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
    if not state["standardiser.fitted"] or state["standardiser.std"].min() < 0:
        raise ValueError(f"{path}: the standardiser has seen no tokens; train the reducer first")


def _storable(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).contiguous()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
