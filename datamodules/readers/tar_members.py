"""Walk the headers of a tar file without unpacking it, distrusting every number and name."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datamodules.errors import DataError

_BLOCK = 512
_MAX_EXTENDED_HEADER = 2**20
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_KINDS = {
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.FIFOTYPE: "named pipe",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}


class DamagedTarError(DataError):
    """The tar ends early or has a header that makes no sense; what came before is usable."""


@dataclass(frozen=True)
class TarMember:
    """A regular file in a tar.

    Attributes:
        name: path in the tar, relative and without "..".
        offset: first byte of its contents in the tar.
        size: number of bytes.
    """

    name: str
    offset: int
    size: int


def _refuse_tricks(shard: Path, name: str, kind: bytes) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"{shard}: member {name!r} points outside the archive; refused, make the shard again "
            "with relative names"
        )
    if kind not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE) or kind in _KINDS:
        what = _KINDS.get(kind, f"of type {kind!r}")
        raise DataError(
            f"{shard}: member {name!r} is a {what}; refused, only regular files may be in a shard"
        )


def _pax_records(data: bytes) -> dict[str, str]:
    """Records of an extended header, each ``length key=value`` and a newline."""
    records = {}
    while data[:1].isdigit():
        length, _, _ = data.partition(b" ")
        record, data = data[: int(length)], data[int(length) :]
        key, _, value = record[len(length) + 1 :].rstrip(b"\n").partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        if int(length) <= len(length):
            break
    return records


def _extended(shard: Path, descriptor: int, info: tarfile.TarInfo, offset: int) -> dict[str, str]:
    """Name and size that an extended header gives to the member after it."""
    if info.size > _MAX_EXTENDED_HEADER:
        raise DamagedTarError(
            f"{shard}: extended header of {info.size} bytes at byte {offset}, at most "
            f"{_MAX_EXTENDED_HEADER} allowed"
        )
    data = os.pread(descriptor, info.size, offset)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    return _pax_records(data) if info.type == tarfile.XHDTYPE else {}


def _header(shard: Path, descriptor: int, offset: int) -> tarfile.TarInfo | None:
    """Header at an offset; None at the end-of-archive marker."""
    block = os.pread(descriptor, _BLOCK, offset)
    if len(block) < _BLOCK:
        raise DamagedTarError(
            f"{shard}: ends at byte {offset + len(block)} without an end-of-archive marker, so it "
            "is truncated; copy it again"
        )
    if not block.strip(b"\0"):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        hint = "compressed; unpack it" if block[:2] == b"\x1f\x8b" else "damaged; copy it again"
        raise DamagedTarError(
            f"{shard}: no tar header at byte {offset} ({error}): {hint}"
        ) from error


def walk_tar(shard: Path, descriptor: int) -> Iterator[TarMember]:
    """Regular files of an uncompressed tar, in order.

    Args:
        shard: path, for messages.
        descriptor: the tar, open for reading.

    Yields:
        The members.

    Raises:
        DamagedTarError: at the first header that is cut off, unreadable or claims more bytes than
            the tar has.
        DataError: at a member that is no regular file or directory, or whose name is absolute or
            has "..".
    """
    shard_size = os.fstat(descriptor).st_size
    offset = 0
    overrides: dict[str, str] = {}
    while (info := _header(shard, descriptor, offset)) is not None:
        extended = info.type in _EXTENDED
        name = overrides.get("path", info.name)
        claimed = str(info.size) if extended else overrides.get("size", str(info.size))
        size = int(claimed) if claimed.isascii() and claimed.isdigit() else -1
        start = offset + _BLOCK
        if size < 0 or start + size > shard_size:
            raise DamagedTarError(
                f"{shard}: member {name!r} claims {claimed[:20]} bytes at byte {start}, but the "
                f"file has {shard_size}: truncated, or its header is damaged; copy it again"
            )
        offset = start + -(-size // _BLOCK) * _BLOCK
        if extended:
            overrides |= _extended(shard, descriptor, info, start)
            continue
        sparse = any(key.startswith("GNU.sparse") for key in overrides)
        _refuse_tricks(shard, name, tarfile.GNUTYPE_SPARSE if sparse else info.type)
        overrides = {}
        if info.type != tarfile.DIRTYPE:
            yield TarMember(name, start, size)
