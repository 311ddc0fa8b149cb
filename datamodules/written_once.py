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
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    Measure = Callable[[Path], Mapping[str, Any]]

MARKER = "complete.json"  # written last: a note on all files


def sizes_of_files(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder but the marker, by relative path."""
    return {
        os.path.relpath(os.path.join(place, name), folder): os.stat(
            os.path.join(place, name)
        ).st_size
        for place, _, names in sorted(os.walk(folder))
        for name in sorted(names)
        if name != MARKER
    }


def ensure_written(
    folder: Path,
    write: Callable[[Path], None],
    measure: Measure = sizes_of_files,
    content: str = "the scenes",
) -> Path:
    """Make sure that a folder holds what a function writes.

    The function writes under a temporary name, which is changed when it is done, so that a folder
    of this name is complete. Processes that start together write once: the others wait.

    Args:
        folder: whose name changes with everything that its content depends on.
        write: fills an empty folder of the same name as ``folder``, elsewhere.
        measure: what is noted of every file but the marker, by relative path; a folder counts
            only while that holds.
        content: what is written, for the message that it cannot be.

    Returns:
        ``folder``.

    Raises:
        DataError: if it cannot be written.
    """
    if _is_complete(folder, measure):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock")) as alone:
            if alone:
                _remove_leftovers(folder)
            if not _is_complete(folder, measure):
                _write(folder, write, measure)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: cannot write {content} here ({error.strerror or error}); "
            "choose a writable folder with enough space"
        ) from error
    return folder


def _write(folder: Path, write: Callable[[Path], None], measure: Measure) -> None:
    place = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    partial = place / folder.name
    partial.mkdir(parents=True)
    try:
        write(partial)
        (partial / MARKER).write_text(json.dumps(measure(partial), indent=1))
        if folder.exists() and not _is_complete(folder, measure):
            warnings.warn(f"{folder}: damaged; its scenes were made again", stacklevel=4)
            shutil.rmtree(folder)
        os.rename(partial, folder)
    except OSError:
        # Without locks another process may have finished first.
        if not _is_complete(folder, measure):
            raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _is_complete(folder: Path, measure: Measure) -> bool:
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


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed writers of a folder have left beside it; only under its lock."""
    for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
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
