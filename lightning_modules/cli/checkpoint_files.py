"""Checkpoint files on disk: their digests, whether they are whole, which one is the newest."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lightning_modules.cli.errors import CheckpointError

_CHUNK = 1 << 22


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Check that a checkpoint is whole and return it, with its tensors left on disk.

    Returns:
        The checkpoint; tensors are memory-mapped, so reading another field of it costs little.

    Raises:
        CheckpointError: If it is missing, damaged, foreign or holds more than tensors and plain
            values; the message names the newest good checkpoint beside it.
    """
    try:
        return _read(path)
    except _UnusableCheckpoint as problem:
        best, _ = newest_good_checkpoint([path.parent])
        hint = f"newest good: {best}" if best else "no good checkpoint beside it"
        raise CheckpointError(f"{problem}; {hint}") from None


def newest_good_checkpoint(
    folders: list[Path], *, for_training: bool = False
) -> tuple[Path | None, list[str]]:
    """Find the whole checkpoint with the most optimiser steps.

    Args:
        folders: Where to look, not recursively.
        for_training: Leave out checkpoints that hold weights only.

    Returns:
        Its path or None, and one line about each damaged checkpoint met.
    """
    good: list[tuple[int, float, Path]] = []
    damaged: list[str] = []
    files = {file for folder in folders for file in folder.glob("*.ckpt") if not file.is_symlink()}
    for file in sorted(files):
        try:
            content = _read(file)
        except _UnusableCheckpoint as problem:
            damaged.append(str(problem))
            continue
        if not for_training or "optimizer_states" in content:
            good.append((int(content["global_step"]), file.stat().st_mtime, file))
    return (max(good)[2] if good else None), damaged


def weights_file(path: Path) -> Path:
    """Return the file itself, or the newest whole checkpoint of a run directory.

    Raises:
        FileNotFoundError: If a run directory has none.
    """
    if not path.is_dir():
        return path
    newest, _ = newest_good_checkpoint([path / "checkpoints"])
    if newest is None:
        raise FileNotFoundError(f"{path}: no whole checkpoint in its checkpoints/; train it first")
    return newest


def remove_partial_files(folder: Path) -> None:
    """Remove what a process killed in the middle of saving has left behind."""
    for leftover in folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)


def digest_file(path: Path) -> Path:
    """Return the path of the digest of a checkpoint; links share the digest of their target."""
    real = path.resolve()
    return real.with_name(real.name + ".sha256")


def record_digest(path: Path, digest: str) -> None:
    """Write the digest of a file that is about to be renamed to ``path``.

    The digest of the file being replaced stays on the second line: whenever the process dies,
    the file under the final name matches one of the two.
    """
    record = digest_file(path)
    digests = [digest]
    if record.is_file() and path.is_file():
        digests += record.read_text(encoding="ascii").split()[:1]
    temporary = record.with_name(f".{record.name}.{os.getpid()}.partial")
    temporary.write_text("\n".join(digests) + "\n", encoding="ascii")
    os.replace(temporary, record)


def readable_size(size: int) -> str:
    """Return a number of bytes as text."""
    if size >= 10**9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size} bytes"


class _UnusableCheckpoint(Exception):
    """A checkpoint that cannot be used; the message says which one and why."""


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise _UnusableCheckpoint(f"{path}: no such checkpoint")
    if path.is_dir():
        problem = "folders are not read, as their index can run code; train with fsdp2.yaml instead"
        raise _UnusableCheckpoint(f"{path}: {problem}")
    stat = path.stat()
    name = f"{path} ({readable_size(stat.st_size)})"
    recorded = digest_file(path)
    if recorded.is_file():
        digest = _digest(path.resolve(), stat.st_mtime_ns, stat.st_size)
        if digest not in recorded.read_text(encoding="ascii", errors="replace").split():
            raise _UnusableCheckpoint(f"{name}: incomplete or damaged")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise _UnusableCheckpoint(f"{name}: {_describe(error)}") from None
    if not isinstance(content, dict) or not {"state_dict", "global_step"} <= content.keys():
        raise _UnusableCheckpoint(f"{name}: not a training checkpoint (no state_dict, global_step)")
    return content


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "Weights only load failed" not in text or "nsupported" not in text:
        return "incomplete or damaged"
    kind = text.partition("GLOBAL ")[2].split(" ")[0] or "Python objects"
    return f"holds {kind}; refused, only tensors and plain values are ever loaded"


@lru_cache(maxsize=64)
def _digest(path: Path, mtime_ns: int, size: int) -> str:
    """Hash a file once per version of it; the last two arguments only tell versions apart."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
