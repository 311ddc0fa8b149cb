"""Hugging Face parquet with an image and a caption in every row, from files or from the hub.

The image column is a struct {bytes, path} or the encoded file itself; a row without bytes names a
file below the folder of the parquet files. A column of texts called category is taken over.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.errors import DataError, SampleError
from datamodules.readers.parquet import ParquetRows, load_hub, read_rows
from datamodules.readers.protocol import Split
from datamodules.readers.split_names import SPLIT_WORDS, group_by_split
from datamodules.text_image.pair_reader import (
    CAPTION_KEYS,
    MAX_CAPTION_BYTES,
    check_characters,
    check_size,
    read_image_file,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The last ones are what the datasets library makes of tar shards.
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
_CATEGORY = "category"


def _first(names: tuple[str, ...], schema: Any) -> str | None:  # noqa: ANN401 - a pyarrow.Schema
    return next((name for name in names if name in schema.names), None)


def _check_columns(schema: Any, name: str) -> None:  # noqa: ANN401 - a pyarrow.Schema
    import pyarrow.types as kinds

    image, caption = _first(_IMAGE_COLUMNS, schema), _first(CAPTION_KEYS, schema)
    if image is None or caption is None:
        raise DataError(
            f"{name}: no column {'image' if image is None else '/'.join(CAPTION_KEYS)} (found: "
            f"{', '.join(schema.names)}); expected image {{bytes, path}} and caption"
        )
    kind = schema.field(image).type
    is_bytes = kinds.is_binary(kind) or kinds.is_large_binary(kind)
    is_struct = kinds.is_struct(kind) and "bytes" in {field.name for field in kind}
    if not is_bytes and not is_struct:
        raise DataError(
            f"{name}: column {image} is {kind}, expected bytes or a struct {{bytes, path}}"
        )
    if not _is_text(schema.field(caption).type):
        raise DataError(f"{name}: column {caption} is {schema.field(caption).type}, expected text")


def _is_text(kind: Any) -> bool:  # noqa: ANN401 - a pyarrow.DataType
    import pyarrow.types as kinds

    return bool(kinds.is_string(kind) or kinds.is_large_string(kind))


class ParquetPairs:
    """Rows of one split.

    Args:
        rows: the rows, with the columns of an image and a caption.
        folder: where the paths of images without bytes start; none if nothing is on disk.

    Raises:
        DataError: if a column is missing or has the wrong type.
    """

    def __init__(self, rows: ParquetRows, folder: Path | None) -> None:
        from pyarrow import compute
        from pyarrow import types as kinds

        table = rows.table
        names = [name for name, _ in rows.sources]
        _check_columns(table.schema, names[0])
        image = table.column(_first(_IMAGE_COLUMNS, table.schema))
        self._bytes, self._paths = image, None
        if kinds.is_struct(image.type):
            # Only these columns, so that a read builds no dictionary.
            self._bytes = compute.struct_field(image, "bytes")
            if "path" in {field.name for field in image.type}:
                self._paths = compute.struct_field(image, "path")
        self._captions = table.column(_first(CAPTION_KEYS, table.schema))
        self._folder = folder
        self._names = names
        self._ends = np.cumsum([count for _, count in rows.sources])
        self._fingerprint = rows.fingerprint
        self._category_names, self._categories = _categories(table)

    @property
    def category_names(self) -> tuple[str, ...]:
        """Sorted texts of the column category, if there is one."""
        return self._category_names

    @property
    def fingerprint(self) -> str:
        """Names, sizes and end bytes of the files."""
        return self._fingerprint

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._captions)

    def read(self, position: int) -> bytes:
        """Encoded image of a row; SampleError if the row holds and names none."""
        sample = self.sample_id(position)
        data = self._bytes[position].as_py()
        if data is not None:
            check_size(len(data), sample)
            return bytes(data)
        path = self._path(position)
        if path is None or self._folder is None:
            raise SampleError(
                f"{sample}: no image bytes in the row; embed the files, as datasets' push_to_hub "
                "and embed_external_files do"
            )
        return read_image_file(self._folder, path, sample)

    def _path(self, position: int) -> str | None:
        return None if self._paths is None else self._paths[position].as_py()

    def caption(self, position: int) -> str:
        """Caption of a row; SampleError if it is null or not UTF-8."""
        sample = self.sample_id(position)
        try:
            caption = self._captions[position].as_py()
        except UnicodeDecodeError:
            raise SampleError(f"{sample}: caption is not UTF-8; save it again as UTF-8") from None
        if caption is None:
            raise SampleError(f"{sample}: no caption (null); write one, or leave the row out")
        if len(caption) > MAX_CAPTION_BYTES:
            raise SampleError(f"{sample}: caption of {len(caption)} characters, too long")
        return check_characters(caption, sample)

    def category(self, position: int) -> int:
        """Position in ``category_names``, -1 if unknown."""
        return int(self._categories[position])

    def key(self, position: int) -> str:
        """Path of the image in the row, else ``row`` and its number."""
        return self._path(position) or f"row {self._place(position)[1]}"

    def _place(self, position: int) -> tuple[int, int]:
        """File of a row, and its number in it."""
        part = int(np.searchsorted(self._ends, position, side="right"))
        return part, position - (int(self._ends[part - 1]) if part else 0)

    def sample_id(self, position: int) -> str:
        """``file:row``, rows counted from 0 within the file."""
        part, row = self._place(position)
        return f"{self._names[part]}:row {row}"


def _categories(table: Any) -> tuple[tuple[str, ...], NDArray[np.int64]]:  # noqa: ANN401
    """Sorted names of the categories, and the category of every row of a pyarrow.Table."""
    from pyarrow import compute

    unknown = np.full(table.num_rows, -1, dtype=np.int64)
    if _CATEGORY not in table.schema.names or not _is_text(table.schema.field(_CATEGORY).type):
        return (), unknown
    column = table.column(_CATEGORY)
    names = compute.drop_null(column.unique()).sort()
    found = compute.index_in(column, value_set=names).cast("int64").fill_null(-1)
    return tuple(names.to_pylist()), np.asarray(found.to_numpy(), dtype=np.int64)


def open_parquet_pairs(root: Path) -> dict[Split, ParquetPairs]:
    """Open every split of a folder of parquet files, or of one file.

    Raises:
        DataError: if a file is damaged, has other columns or names no split.
    """
    files = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    base = root.parent if root.is_file() else root
    return {
        split: ParquetPairs(_read(part), base)
        for split, part in group_by_split(files, base).items()
    }


def _read(files: list[Path]) -> ParquetRows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        image = _first(_IMAGE_COLUMNS, pq.read_schema(files[0]))
    except (pa.ArrowInvalid, OSError):
        image = None  # read_rows says what is wrong
    return read_rows(files, _check_columns, image or "image")


def open_hub_pairs(name: str) -> dict[Split, ParquetPairs]:
    """Open every split of a data set of the Hugging Face hub, or of its local cache.

    Args:
        name: ``owner/data_set``.

    Raises:
        DataError: if it is neither cached nor reachable, or has other columns.
    """
    from datasets import Image

    remedy = (
        f"fetch its train*.parquet or *.tar from huggingface.co/datasets/{name}/tree/main (hf "
        f"download {name} --repo-type dataset --local-dir DIR) and set data.init_args.root to DIR"
    )
    readers: dict[Split, ParquetPairs] = {}
    for split, dataset in load_hub(name, remedy).items():
        if split not in SPLIT_WORDS:
            continue
        source = f"{name}[{split}]"
        _check_columns(dataset.data.schema, source)
        image = _first(_IMAGE_COLUMNS, dataset.data.schema)
        table = dataset.cast_column(image, Image(decode=False)).data
        stamp = f"{name}:{split}:{dataset.num_rows}:{dataset.info.version}"
        found = ParquetRows(table, [(source, dataset.num_rows)], stamp)
        readers[SPLIT_WORDS[split]] = ParquetPairs(found, None)
    return readers
