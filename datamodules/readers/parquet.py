"""Hugging Face parquet: columns image {bytes, path} and label, from files or from the hub.

Class names are those of the schema's ClassLabel, else the numbers 0 .. largest label. Images stay
encoded; small files are read into memory, large ones are memory-mapped from the Arrow copy that
the datasets library keeps in its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from datamodules.errors import DataError, SampleError
from datamodules.readers.protocol import Split
from datamodules.readers.split_names import SPLIT_WORDS, group_by_split
from datamodules.readers.stamps import file_stamp

if TYPE_CHECKING:
    from numpy.typing import NDArray

_IN_MEMORY_BYTES = 256 * 2**20
_NULL = -(2**62)


class ParquetRows(NamedTuple):
    """Rows of the files of one split.

    Attributes:
        table: pyarrow's table, or that of a ``datasets.Dataset``; images are encoded files.
        sources: (name of a file, rows in it) in row order.
        fingerprint: identity of the files.
    """

    table: Any
    sources: list[tuple[str, int]]
    fingerprint: str


class ParquetReader:
    """Rows of one split.

    Args:
        table: pyarrow's table, or that of a ``datasets.Dataset``, with columns image and label.
        sources: (name of a file, rows in it) in row order.
        fingerprint: identity of the files.

    Raises:
        DataError: if a column is missing or has the wrong type.
    """

    def __init__(self, table: Any, sources: list[tuple[str, int]], fingerprint: str) -> None:  # noqa: ANN401
        from datasets import Features
        from pyarrow import compute

        names = [name for name, _ in sources]
        _check_columns(table.schema, names[0])
        # Only this column of bytes, so that a read builds no path and no dictionary.
        self._bytes = compute.struct_field(table.column("image"), "bytes")
        labels = table.column("label").cast("int64").fill_null(_NULL)
        self._labels: NDArray[np.int64] = np.asarray(labels.to_numpy(), dtype=np.int64)
        self._names = names
        self._ends = np.cumsum([rows for _, rows in sources])
        self._fingerprint = fingerprint
        features = Features.from_arrow_schema(table.schema)
        self._class_names = _class_names(features["label"], self._labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the schema's ClassLabel, else numbers."""
        return self._class_names

    @property
    def fingerprint(self) -> str:
        """Names, sizes and end bytes of the files."""
        return self._fingerprint

    @property
    def is_unlabelled(self) -> bool:
        """Whether every label is -1, as in test splits whose labels are kept back."""
        return len(self) > 0 and bool(np.all(self._labels == -1))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._labels)

    def label(self, position: int) -> int:
        """Class of a row; SampleError if it is null or out of range."""
        label = int(self._labels[position])
        if not 0 <= label < len(self._class_names):
            shown = "null" if label == _NULL else str(label)
            raise SampleError(
                f"{self.sample_id(position)}: label {shown}, expected 0 .. "
                f"{len(self._class_names) - 1}; leave unlabelled rows out"
            )
        return label

    def read(self, position: int) -> bytes:
        """Encoded image of a row; SampleError if the row holds none."""
        data = self._bytes[position].as_py()
        if data is None:
            raise SampleError(
                f"{self.sample_id(position)}: no image bytes in the row; embed the files, as "
                "datasets' push_to_hub and embed_external_files do"
            )
        return bytes(data)

    def sample_id(self, position: int) -> str:
        """``file:row``, rows counted from 0 within the file."""
        part = int(np.searchsorted(self._ends, position, side="right"))
        first = 0 if part == 0 else int(self._ends[part - 1])
        return f"{self._names[part]}:row {position - first}"


def _check_columns(schema: Any, name: str) -> None:  # noqa: ANN401 - a pyarrow.Schema
    import pyarrow.types as kinds

    missing = [column for column in ("image", "label") if column not in schema.names]
    if missing:
        raise DataError(
            f"{name}: no column {' or '.join(missing)} (found: {', '.join(schema.names)}); expected"
            " image {bytes, path} and label"
        )
    image, label = schema.field("image").type, schema.field("label").type
    if not kinds.is_struct(image) or "bytes" not in {field.name for field in image}:
        raise DataError(f"{name}: column image is {image}, expected a struct {{bytes, path}}")
    if not kinds.is_integer(label):
        raise DataError(
            f"{name}: column label is {label}, expected integers 0 .. n - 1; "
            "cast it with datasets' class_encode_column"
        )


def _class_names(feature: Any, labels: NDArray[np.int64]) -> tuple[str, ...]:  # noqa: ANN401
    names = getattr(feature, "names", None)
    if names is not None:
        return tuple(str(name) for name in names)
    return tuple(str(index) for index in range(max(int(labels.max(initial=-1)) + 1, 0)))


def read_rows(
    files: list[Path], check_columns: Callable[[Any, str], None], image: str = "image"
) -> ParquetRows:
    """Open parquet files that belong together.

    Args:
        files: in row order.
        check_columns: is given the schema and the name of each file, and raises DataError.
        image: column of the images, which are left encoded.

    Raises:
        DataError: if a file is incomplete or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for file in files:
        try:
            metadata = pq.ParquetFile(file).metadata
            check_columns(pq.read_schema(file), str(file))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{file}: not a readable parquet file ({file.stat().st_size} bytes), incomplete or "
                "damaged; copy it again"
            ) from error
        rows.append(metadata.num_rows)
    if sum(file.stat().st_size for file in files) <= _IN_MEMORY_BYTES:
        tables = [pq.read_table(file) for file in files]
        table = pa.concat_tables(tables, promote_options="default")
    else:
        table = _mapped_table(files, image)
    sources = [(str(file), count) for file, count in zip(files, rows, strict=True)]
    return ParquetRows(table, sources, file_stamp(files))


def _mapped_table(files: list[Path], image: str) -> Any:  # noqa: ANN401 - a datasets table
    """The memory-mapped Arrow copy of files in the cache of the datasets library."""
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, Image

    features = Features.from_arrow_schema(pq.read_schema(files[0]))
    if image in features:
        features[image] = Image(decode=False)
    return Dataset.from_parquet([str(file) for file in files], features=features).data


def _open_files(files: list[Path]) -> ParquetReader:
    return ParquetReader(*read_rows(files, _check_columns))


def open_parquet(root: Path) -> dict[Split, ParquetReader]:
    """Open every labelled split of a folder of parquet files, or of one file.

    Args:
        root: folder or file.

    Returns:
        A reader for each split; a test split without labels is left out.

    Raises:
        DataError: if a file is damaged, has other columns or names no split.
    """
    files = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    base = root.parent if root.is_file() else root
    readers = {split: _open_files(part) for split, part in group_by_split(files, base).items()}
    return _labelled(readers)


def _labelled(readers: dict[Split, ParquetReader]) -> dict[Split, ParquetReader]:
    return {
        split: reader
        for split, reader in readers.items()
        if split != "test" or not reader.is_unlabelled
    }


def open_hub(name: str) -> dict[Split, ParquetReader]:
    """Open every labelled split of a data set of the Hugging Face hub, or of its local cache.

    Args:
        name: ``owner/data_set``.

    Returns:
        A reader for each split.

    Raises:
        DataError: if it is neither cached nor reachable.
    """
    from datasets import Image

    remedy = (
        "put its train*.parquet, val*.parquet and test*.parquet into one folder and set "
        "data.init_args.root to it"
    )
    splits = load_hub(name, remedy)
    readers: dict[Split, ParquetReader] = {}
    for split, dataset in splits.items():
        if split not in SPLIT_WORDS:
            continue
        _check_columns(dataset.data.schema, f"{name}[{split}]")
        table = dataset.cast_column("image", Image(decode=False)).data
        stamp = f"{name}:{split}:{dataset.num_rows}:{dataset.info.version}"
        sources = [(f"{name}[{split}]", dataset.num_rows)]
        readers[SPLIT_WORDS[split]] = ParquetReader(table, sources, stamp)
    return _labelled(readers)


def load_hub(name: str, remedy: str) -> Any:  # noqa: ANN401 - a datasets.DatasetDict
    """All splits of a data set of the Hugging Face hub, or of its local cache.

    Args:
        name: ``owner/data_set``.
        remedy: what to do if it is neither cached nor reachable, for the message.

    Raises:
        DataError: one line with the reason and the remedy.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name)
    except Exception as error:
        # The hub client raises many unrelated types (HTTP, cache, offline mode, gated access).
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"data.init_args.root={name}: no such folder, and the hub data set of this name cannot "
            f"be loaded ({type(error).__name__}: {reason}); {remedy}"
        ) from error
