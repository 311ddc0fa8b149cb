"""Checkpoint files made to do harm, shared by the tests of those who read checkpoints."""

import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Call:
    """Pickles as a call of ``function`` on loading, and as attributes set on the result."""

    def __init__(
        self, function: Callable[..., object], *arguments: object, state: object = None
    ) -> None:
        self.parts = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


class StoragePickler(pickle.Pickler):
    """Writes ("storage", ...) tuples as references to records of the archive, as torch does."""

    def persistent_id(self, value: object) -> object:
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None


def dump(content: object, protocol: int = 2, old_names: bool = False) -> bytes:
    stream = io.BytesIO()
    StoragePickler(stream, protocol, fix_imports=old_names).dump(content)
    return stream.getvalue()


def write(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive as torch writes it, around any pickle, with one record of 16 bytes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(16))
    return path


def tensor(numel: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Call:
    storage = ("storage", torch.FloatStorage, "0", "cpu", numel)
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, OrderedDict())


PAYLOADS: list[tuple[str, Callable[[str], Any]]] = [
    ("posix.system", lambda marker: Call(os.system, f"touch {marker}")),
    ("builtins.eval", lambda marker: Call(eval, f"open({marker!r}, 'w')")),
    ("builtins.exec", lambda marker: Call(exec, f"open({marker!r}, 'w')")),
    ("builtins.getattr", lambda marker: Call(getattr, "text", "upper")),
    ("io.open", lambda marker: Call(open, marker, "w")),
    ("builtins.bytearray", lambda marker: Call(bytearray, 10**13)),
    ("subprocess.Popen", lambda marker: Call(subprocess.Popen, ["touch", marker])),
    ("torch.serialization.load", lambda marker: Call(torch.load, marker)),
    ("torch.hub.load", lambda marker: Call(torch.hub.load, marker, "model")),
    ("torch.storage._load_from_bytes", lambda marker: Call(torch.storage._load_from_bytes, "")),
    (
        "torch._utils._rebuild_sparse_tensor",
        lambda marker: Call(torch._utils._rebuild_sparse_tensor, 0, 0),
    ),
    ("shutil.rmtree", lambda marker: Call(__import__("shutil").rmtree, marker)),
]
