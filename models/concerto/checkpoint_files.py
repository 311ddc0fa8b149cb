"""Files of Concerto's weights: nothing in them is run, and they are written whole or not at all."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.layers.weights_archive import check_state, load_archive

_CONFIG_BYTES = 65536
_EXPECTED = "a backbone or a training checkpoint of Concerto"


class FileContent(NamedTuple):
    """What a file holds.

    Attributes:
        state: Its weights, on the CPU.
        config: Configuration of a released backbone, if any.
        shape: Sizes that a checkpoint of this project states, if any.
    """

    state: dict[str, Tensor]
    config: Mapping[str, object] | None
    shape: Mapping[str, Any] | None


def read_file(path: Path) -> FileContent:
    """Read weights and what is said about them.

    Args:
        path: Archive of torch, or ``.safetensors``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected {_EXPECTED}, for example concerto_base.pth"
        )
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except SafetensorError as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{path}: incomplete or damaged ({reason})") from None
        return FileContent(check_state(path, state, _EXPECTED), _config_beside(path), None)
    content = load_archive(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no state dict; expected {_EXPECTED}")
    state = check_state(path, content.get("state_dict", content), _EXPECTED)
    config, own = content.get("config"), content.get("hyper_parameters")
    shape = own.get("shape") if isinstance(own, dict) else None
    return FileContent(
        state, _named(path, config), _named(path, shape) if "state_dict" in content else None
    )


def _config_beside(path: Path) -> Mapping[str, object] | None:
    """The JSON file of a configuration with the name of the weights; None if there is none."""
    path = path.with_suffix(".json")
    if not path.is_file():
        return None
    if path.stat().st_size > _CONFIG_BYTES:
        raise ValueError(f"{path}: larger than {_CONFIG_BYTES} bytes; no backbone's configuration")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: incomplete, damaged or no configuration") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a configuration by name")
    return config


def _named(path: Path, value: object) -> Mapping[str, Any] | None:
    """A configuration by name, or None."""
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{path}: its configuration is no dictionary of plain values; refused")
    return value


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let a file appear under its name only when whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
