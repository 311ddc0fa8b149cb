"""Files that a run reads before it starts: weights named in its configuration, its checkpoints."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from safetensors import SafetensorError, safe_open

from lightning_modules.cli.checkpoint_files import (
    digest_file,
    newest_good_checkpoint,
    read_checkpoint,
    readable_size,
)
from lightning_modules.cli.doctor.findings import Finding
from lightning_modules.cli.errors import CheckpointError

_WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".npz", ".mat")
_ZIP_MAGIC = b"PK"


class UnusableFile(Exception):
    """A file that cannot be read; the message says which one and why."""


def named_paths(section: Namespace) -> dict[str, Path]:
    """Every path in the settings of a component, by the flag that sets it."""
    found = {}
    for key, value in section.items():
        if isinstance(value, Path):
            found[key.replace("init_args.", "")] = value
    return found


def examine_weights(paths: dict[str, Path], component: str) -> Iterator[Finding]:
    """A finding for each file or folder of weights that the configuration names."""
    for key, path in paths.items():
        flag = f"--{component}.{key}"
        if not path.exists():
            detail = f"{path} is not there; put it there or give another with {flag}"
            yield Finding("fail", "weights", detail)
            continue
        try:
            size = measure_weights(path)
        except (UnusableFile, CheckpointError, OSError) as problem:
            detail = f"{problem}; fetch it again or give another with {flag}"
            yield Finding("fail", "weights", detail)
        else:
            yield Finding("ok", "weights", f"{path}: {readable_size(size)}, whole ({flag})")


def measure_weights(path: Path) -> int:
    """Check a file, a folder of weights or the directory of a run, and return its bytes.

    Raises:
        UnusableFile: If it is damaged.
        CheckpointError: If a checkpoint is damaged.
    """
    if not path.is_dir():
        _check_file(path)
        return path.stat().st_size
    if (path / "checkpoints").is_dir():
        newest, damaged = newest_good_checkpoint([path / "checkpoints"])
        if newest is None:
            reason = "; ".join(damaged) or "none yet"
            raise UnusableFile(f"{path}: no whole checkpoint in it ({reason})")
        return newest.stat().st_size
    _check_shards(path)
    files = [file for file in path.rglob("*") if file.suffix in _WEIGHT_SUFFIXES]
    for file in files:
        _check_file(file)
    if not files:
        raise UnusableFile(f"{path}: no weights in it ({', '.join(_WEIGHT_SUFFIXES)})")
    return sum(file.stat().st_size for file in files)


def examine_checkpoints(run: Path) -> Generator[Finding, None, Path | None]:
    """Findings on the checkpoints of the run to go on with.

    Returns:
        The checkpoint that it goes on with, or None.
    """
    newest, damaged = newest_good_checkpoint([run / "checkpoints", run], for_training=True)
    for line in damaged:
        yield Finding("warn" if newest else "fail", "checkpoints", f"{line}; it is passed over")
    if newest is not None:
        step = int(read_checkpoint(newest)["global_step"])
        detail = f"goes on at step {step} with {newest}, digest right"
        if not digest_file(newest).is_file():
            detail = f"goes on at step {step} with {newest}; it has no digest to check it by"
        yield Finding("ok", "checkpoints", detail)
    elif not damaged:
        detail = f"{run} has none: fit starts at step 0"
        yield Finding("warn", "checkpoints", detail)
    return newest


def _check_file(path: Path) -> None:
    if path.stat().st_size == 0:
        raise UnusableFile(f"{path}: empty")
    if digest_file(path).is_file():
        read_checkpoint(path)
    elif path.suffix == ".safetensors":
        _check_safetensors(path)
    elif path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        _check_archive(path)


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, "pt") as content:
            content.keys()
    except SafetensorError as error:
        raise UnusableFile(f"{path}: incomplete or no safetensors file ({error})") from None


def _check_archive(path: Path) -> None:
    """Check that a file of torch is whole; what is in it is for its reader to judge."""
    with path.open("rb") as stream:
        is_zip = stream.read(2) == _ZIP_MAGIC
    if is_zip and not zipfile.is_zipfile(path):
        raise UnusableFile(f"{path} ({readable_size(path.stat().st_size)}): cut off")
    if is_zip:
        return
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        text = " ".join(str(error).split())
        if "Weights only load failed" not in text or "nsupported" not in text:
            raise UnusableFile(f"{path}: not a file of torch, or damaged") from None


def _check_shards(folder: Path) -> None:
    """Check that every part named in an index is there."""
    for index in folder.rglob("*.index.json"):
        try:
            content: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
            names = sorted(set(content["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise UnusableFile(f"{index}: not an index of weight files") from None
        missing = [name for name in names if not (index.parent / str(name)).is_file()]
        if missing:
            raise UnusableFile(
                f"{index.parent}: {len(missing)} of {len(names)} parts are missing "
                f"({missing[0]}, ...)"
            )
