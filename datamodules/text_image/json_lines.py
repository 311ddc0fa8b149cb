"""Lines of JSON that name an image and give its caption; and image folders with metadata.jsonl.

A line is an object with the image under image, img_path or file_name, relative to the folder of the
file or to another root, and the caption under caption, text, txt or prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.errors import DataError, SampleError
from datamodules.readers.protocol import Split
from datamodules.readers.split_names import group_by_split
from datamodules.readers.stamps import file_stamp
from datamodules.text_image.pair_reader import (
    MAX_CAPTION_BYTES,
    caption_in,
    parse_json,
    read_image_file,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

METADATA = "metadata.jsonl"
"""Name of the file that makes an image folder of a folder."""

_IMAGE_KEYS = ("image", "img_path", "file_name")
_CHUNK = 2**24


def _line_starts(file: Path) -> NDArray[np.int64]:
    """First byte of every line of a file, and its end; (lines + 1,)."""
    parts = [np.zeros(1, dtype=np.int64)]
    done = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            newlines = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
            parts.append(newlines + (done + 1))
            done += len(chunk)
    starts = np.concatenate(parts)
    return starts if starts[-1] == done else np.append(starts, done)


class JsonLines:
    """Lines of the files of one split; only where lines start is kept in memory.

    Args:
        files: in order.
        image_root: where the names of images start; none takes the folder of each file.
    """

    def __init__(self, files: list[Path], image_root: Path | None) -> None:
        self._files = files
        self._image_root = image_root
        places = []
        for part, file in enumerate(files):
            starts = _line_starts(file)
            first, size = starts[:-1], np.diff(starts)
            number = np.arange(len(first))
            place = np.stack([np.full(len(first), part), first, size, number], axis=1)
            places.append(place[size > 1])  # the others are empty
        self._places = np.concatenate(places)  # (N, 4)

    @property
    def category_names(self) -> tuple[str, ...]:
        """None: they would take reading all lines."""
        return ()

    @property
    def fingerprint(self) -> str:
        """Names, sizes and end bytes of the files."""
        return file_stamp(self._files)

    def __len__(self) -> int:
        """Number of lines that are not empty."""
        return len(self._places)

    def _line(self, position: int) -> dict[str, Any]:
        part, first, size, _ = self._places[position].tolist()
        sample = self.sample_id(position)
        if size > MAX_CAPTION_BYTES:
            raise SampleError(f"{sample}: {size} bytes, at most {MAX_CAPTION_BYTES} allowed")
        try:
            with self._files[part].open("rb") as stream:
                stream.seek(first)
                data = stream.read(size)
        except OSError as error:
            raise SampleError(f"{sample}: cannot be read ({error.strerror})") from None
        value = parse_json(data, sample)
        if not isinstance(value, dict):
            raise SampleError(f"{sample}: expected a JSON object, found {type(value).__name__}")
        return value

    def _image_name(self, position: int) -> str:
        line = self._line(position)
        found = next((line[name] for name in _IMAGE_KEYS if name in line), None)
        if not isinstance(found, str) or not found:
            raise SampleError(
                f"{self.sample_id(position)}: no image; expected a path under "
                f"{', '.join(_IMAGE_KEYS)}"
            )
        return found

    def read(self, position: int) -> bytes:
        """Encoded image of a line; SampleError if it cannot be read or lies elsewhere."""
        root = self._image_root or self._files[int(self._places[position, 0])].parent
        return read_image_file(root, self._image_name(position), self.sample_id(position))

    def caption(self, position: int) -> str:
        """Caption of a line; SampleError if it has none."""
        return caption_in(self._line(position), self.sample_id(position))

    def category(self, position: int) -> int:
        """-1."""
        return -1

    def key(self, position: int) -> str:
        """Name of the image as the line has it."""
        return self._image_name(position)

    def sample_id(self, position: int) -> str:
        """``file:line``, lines counted from 1."""
        part, _, _, number = self._places[position].tolist()
        return f"{self._files[part]}:line {number + 1}"


def open_json_lines(
    root: Path, image_root: Path | None, *, metadata: bool
) -> dict[Split, JsonLines]:
    """Open every split of a folder of jsonl files, or of one file.

    Args:
        root: file or folder.
        image_root: where the names of images start; none takes the folder of each file.
        metadata: whether only files called metadata.jsonl count, as in image folders; otherwise
            only others do.

    Raises:
        DataError: if only some of the files tell their split, or a file cannot be read.
    """
    files = [root] if root.is_file() else sorted([*root.glob("*.jsonl"), *root.glob("*/*.jsonl")])
    if root.is_dir():
        files = [file for file in files if (file.name == METADATA) == metadata]
    base = root.parent if root.is_file() else root
    try:
        return {
            split: JsonLines(part, image_root)
            for split, part in group_by_split(files, base).items()
        }
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
