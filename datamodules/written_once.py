"""Folders of generated data that are written once, however many processes ask for them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import uuid
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from datamodules.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MARKER = "complete.json"  # written last: a note on all files


def ensure_written(folder: Path, write: Callable[[Path], None]) -> Path:
    """Make sure that a folder holds what a function writes.

    The function writes under a temporary name, which is changed when it is done, so that a folder
    of this name is complete. Processes that start together write once: the others wait.

    Args:
        folder: whose name changes with everything that its content depends on.
        write: fills an empty folder of the same name as ``folder``, elsewhere.

    Returns:
        ``folder``.

    Raises:
        DataError: if it cannot be written.
    """
    if is_complete(folder, _sizes):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")) as alone:
            if alone:
                remove_leftovers(folder)
            if not is_complete(folder, _sizes):
                _write(folder, write)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written ({error.strerror or error}); choose a writable folder "
            "with enough space"
        ) from error
    return folder


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    place = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    partial = place / folder.name
    partial.mkdir(parents=True)
    try:
        write(partial)
        (partial / MARKER).write_text(json.dumps(_sizes(partial)))
        if folder.exists() and not is_complete(folder, _sizes):
            warnings.warn(f"{folder}: damaged; it was written again", stacklevel=4)
            shutil.rmtree(folder)
        os.rename(partial, folder)
    except OSError:
        # Without locks another process may have finished first.
        if not is_complete(folder, _sizes):
            raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


def is_complete(folder: Path, measure: Callable[[Path], dict[str, Any]]) -> bool:
    """Whether the marker lies here and its note still holds.

    Args:
        folder: may not exist.
        measure: what the note says of every file but the marker, by relative path.
    """
    try:
        noted = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return bool(noted == measure(folder))


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers of a folder have left beside it; only under its lock."""
    for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder but the marker, by relative path."""
    return {
        os.path.relpath(os.path.join(place, name), folder): os.stat(
            os.path.join(place, name)
        ).st_size
        for place, _, names in sorted(os.walk(folder))
        for name in sorted(names)
        if name != MARKER
    }


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock file's lock, which ends with the process; False where the disk has no locks."""
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            yield False
        else:
            yield True
