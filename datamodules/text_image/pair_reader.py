"""What a reader of pairs is, and how captions and images are taken from files that others wrote."""

from __future__ import annotations

import codecs
import json
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from datamodules.errors import SampleError

CAPTION_KEYS = ("caption", "text", "txt", "prompt")
"""Names of a caption in a JSON object or among columns; the first one found counts."""

MAX_CAPTION_BYTES = 2**20
MAX_IMAGE_BYTES = 2**28


class PairReader(Protocol):
    """Random access to the pairs of one split; safe to use after a fork and to pickle."""

    @property
    def category_names(self) -> tuple[str, ...]:
        """Sorted names of the categories; none if they are not known."""
        ...

    @property
    def fingerprint(self) -> str:
        """Text that changes when the files do, found without reading all of them."""
        ...

    def __len__(self) -> int:
        """Number of pairs, unusable ones included."""
        ...

    def read(self, position: int) -> bytes:
        """An encoded image file; SampleError if it cannot be read."""
        ...

    def caption(self, position: int) -> str:
        """The caption as it is stored, perhaps empty; SampleError if there is none."""
        ...

    def category(self, position: int) -> int:
        """Position in ``category_names``, -1 if unknown."""
        ...

    def key(self, position: int) -> str:
        """Name of the pair, unique within its file."""
        ...

    def sample_id(self, position: int) -> str:
        """File, and key or row, for error messages."""
        ...


def decode_text(data: bytes, sample: str) -> str:
    """Text in UTF-8, without a byte order mark; nothing is replaced.

    Args:
        data: bytes of a caption.
        sample: what they belong to, for the message.

    Raises:
        SampleError: naming the first byte that is not UTF-8.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(
            f"{sample}: caption is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); "
            "save it again as UTF-8"
        ) from None


def caption_in(value: Any, sample: str) -> str:  # noqa: ANN401 - from JSON
    """Caption in a JSON value: an object with one of ``CAPTION_KEYS``.

    Raises:
        SampleError: if there is none, or it is no text.
    """
    found = value if isinstance(value, dict) else {}
    for name in CAPTION_KEYS:
        caption = found.get(name)
        if isinstance(caption, str):
            return check_characters(caption, sample)
    raise SampleError(f"{sample}: no caption; expected a text under {', '.join(CAPTION_KEYS)}")


def check_characters(text: str, sample: str) -> str:
    """The text itself; SampleError if it holds half of a surrogate pair, which is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SampleError(
            f"{sample}: caption holds half of a surrogate pair; save it again as UTF-8"
        ) from None
    return text


def parse_json(data: bytes, sample: str) -> Any:  # noqa: ANN401 - any JSON
    """A JSON value in UTF-8; SampleError if it is none."""
    try:
        return json.loads(decode_text(data, sample))
    except (ValueError, RecursionError) as error:
        if isinstance(error, SampleError):
            raise
        reason = " ".join(str(error).split())[:80]
        raise SampleError(f"{sample}: no JSON ({reason}); write it again") from None


def read_image_file(root: Path, name: str, sample: str) -> bytes:
    """Contents of a file that must lie below a folder, links included.

    Args:
        root: the folder.
        name: relative path of the file, as the data gives it.
        sample: what it belongs to, for the message.

    Raises:
        SampleError: if the file lies elsewhere, is missing, is no regular file or is too large.
    """
    path = root / name
    pure = PurePosixPath(name.replace("\\", "/"))
    try:
        inside = not pure.is_absolute() and ".." not in pure.parts and "\0" not in name
        if not inside or not path.resolve().is_relative_to(root.resolve()):
            raise SampleError(
                f"{sample}: image {name[:200]!r} leads out of {root}; use relative names, or set "
                "data.init_args.image_root to the folder that they start from"
            )
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise SampleError(f"{sample}: image {path} is no regular file")
        check_size(found.st_size, sample)
        return path.read_bytes()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise SampleError(f"{sample}: image {path} cannot be read ({reason})") from None


def check_size(size: int, sample: str) -> None:
    """Refuse an encoded image of more than ``MAX_IMAGE_BYTES`` with a SampleError."""
    if size > MAX_IMAGE_BYTES:
        raise SampleError(f"{sample}: image of {size} bytes, at most {MAX_IMAGE_BYTES} allowed")
