"""Safe reading of torch's checkpoint files: tensors, plain values and inert stand-ins, never code.

A pickle in such a file may name tensors' own constructors and a few classes that are replaced by
empty stand-ins (`models.layers.inert_objects`); any other name is refused before anything is read.
"""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from models.layers.inert_objects import refused_names, stand_ins


def load_archive(path: Path) -> object:
    """Content of a zip archive as ``torch.save`` writes it, on the CPU, tensors mapped from disk.

    Raises:
        ValueError: The file is damaged, or holds more than tensors, plain values and inert
            configuration objects; the message names what was refused.
    """
    _check_archive(path)
    try:
        with torch.serialization.safe_globals(stand_ins()):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[-160:]
        raise ValueError(f"{path}: incomplete, damaged or not plain weights ({reason})") from None


def check_state(path: Path, state: object, expected: str) -> dict[str, Tensor]:
    """The state dict of a loaded file, made of whole dense tensors.

    Args:
        path: Of the file, for messages.
        state: What should be the state dict.
        expected: What the file should have been, for messages.

    Raises:
        ValueError: It is none, is empty, or a tensor is none or states more than the file holds.
    """
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: holds no state dict; expected {expected}")
    for key, value in state.items():
        dense = isinstance(value, Tensor) and value.layout is torch.strided
        if not isinstance(key, str) or not dense or value.device.type != "cpu":
            raise ValueError(f"{path}: {_short(key)} in its state dict is no plain tensor; refused")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: {_short(key)} states shape {tuple(value.shape)}, more than the file holds"
            )
    return state


def _short(key: object) -> str:
    """A key of a file as one short line."""
    return " ".join(str(key).split())[:120]


def _check_archive(path: Path) -> None:
    """Raise ``ValueError`` unless the file is a whole archive that names only what is allowed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            pickles = [name for name in names if name.endswith("/data.pkl")]
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            sound = stored and len(set(names)) == len(names) and len(pickles) == 1
            refused = refused_names(archive.read(pickles[0])) if sound else []
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError):
        raise ValueError(f"{path}: incomplete, damaged or no checkpoint of torch") from None
    if not sound:
        raise ValueError(f"{path}: not an archive as torch writes it; refused")
    if refused:
        raise ValueError(
            f"{path}: holds {refused[0]}; refused, only tensors, plain values and inert "
            "configuration objects are ever loaded"
        )
