"""Checkpoints that appear only when whole, carry a digest and never run code when read."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_modules.cli.checkpoint_files import (
    digest_file,
    read_checkpoint,
    readable_size,
    record_digest,
)
from lightning_modules.cli.errors import CheckpointError


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files with a SHA-256 beside each, checked when one is loaded.

    A file is written under a temporary name, flushed to disk and renamed, so what bears the final
    name is complete. Remote paths (``s3://...``) are left to Lightning, without a digest.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any | None = None,  # noqa: ANN401 - Lightning's own signature
    ) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: If the disk is full or the folder cannot be written.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            record_digest(target, _write(checkpoint, temporary))
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(_describe_failed_save(target, error)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Load a checkpoint: tensors and plain values only, whatever ``weights_only`` says.

        Raises:
            CheckpointError: If the file is damaged or holds anything but tensors and plain values.
        """
        if "://" not in str(path):
            read_checkpoint(Path(path))
        return super().load_checkpoint(path, map_location, weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and its digest."""
        digest = digest_file(Path(path))
        super().remove_checkpoint(path)
        digest.unlink(missing_ok=True)


class _HashingStream:
    """A write-only stream that hashes what passes through it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.stream.write(data)

    def flush(self) -> None:
        self.stream.flush()


def _write(checkpoint: dict[str, Any], path: Path) -> str:
    """Write a checkpoint through to the disk and return its digest."""
    with path.open("wb") as stream:
        hashing = _HashingStream(stream)
        torch.save(checkpoint, hashing)  # type: ignore[arg-type]  # torch uses write and flush only
        stream.flush()
        os.fsync(stream.fileno())
    return hashing.digest.hexdigest()


def _describe_failed_save(target: Path, error: Exception) -> str:
    try:
        free = readable_size(shutil.disk_usage(target.parent).free)
    except OSError:
        free = "unknown"
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return f"{target}: checkpoint not saved: {reason} (free space: {free}); earlier ones are kept"
