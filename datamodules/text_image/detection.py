"""Find out how pairs of images and captions lie at a root, and open them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from datamodules.errors import DataError, FaultPolicy
from datamodules.readers.layouts import only_layout
from datamodules.readers.protocol import Split
from datamodules.text_image.json_lines import METADATA, open_json_lines
from datamodules.text_image.pair_reader import PairReader
from datamodules.text_image.parquet_pairs import open_hub_pairs, open_parquet_pairs
from datamodules.text_image.tar_pairs import open_tar_pairs

PairLayout = Literal["auto", "webdataset", "parquet", "jsonl", "imagefolder"]
"""Layouts on disk; "auto" finds out."""

_Found = Literal["webdataset", "parquet", "jsonl", "imagefolder"]
_BY_SUFFIX: dict[str, _Found] = {".tar": "webdataset", ".parquet": "parquet", ".jsonl": "jsonl"}
LOOKED_FOR = (
    "*.tar with KEY.jpg and KEY.txt (webdataset), *.parquet with image and caption (parquet), "
    f"*.jsonl (jsonl) or {METADATA} beside the images (imagefolder)"
)
_PATTERNS: dict[_Found, tuple[str, ...]] = {
    "webdataset": ("*.tar", "*/*.tar"),
    "parquet": ("*.parquet", "*/*.parquet", "*/*/*.parquet"),
    "jsonl": ("*.jsonl", "*/*.jsonl"),
    "imagefolder": (METADATA, f"*/{METADATA}"),
}


def open_pairs(
    root: Path, layout: PairLayout, image_root: Path | None, faults: FaultPolicy
) -> Mapping[Split, PairReader]:
    """Open every split at a root.

    Args:
        root: file, folder, shard pattern, or the name of a hub data set where nothing lies.
        layout: how the data is stored.
        image_root: where the names of images in jsonl files start; none takes the files' folders.
        faults: what happens at damaged shards.

    Raises:
        DataError: if there is no data of the layout, it cannot be used, or there is no training
            split or an empty one.
    """
    found = detect(root) if layout == "auto" else layout
    readers: Mapping[Split, PairReader]
    if found == "webdataset":
        readers = open_tar_pairs(root, faults)
    elif found == "parquet":
        readers = open_parquet_pairs(root) if root.exists() else open_hub_pairs(str(root))
    else:
        readers = open_json_lines(root, image_root, metadata=found == "imagefolder")
    if not readers:
        raise DataError(f"{root}: no {found} files; looked for {LOOKED_FOR}")
    if "train" not in readers:
        raise DataError(f"{root}: no training split (found: {', '.join(readers)}); add train files")
    for split, reader in readers.items():
        if len(reader) == 0:
            raise DataError(f"{root}: split {split} is empty; add pairs or remove its files")
    return readers


def detect(root: Path) -> _Found:
    """The only layout that fits what lies at a root, judged by names.

    Raises:
        DataError: if none or several fit.
    """
    if "{" in str(root):
        return "webdataset"
    if not root.exists():
        return "parquet"
    if root.is_file():
        if root.name == METADATA:
            return "imagefolder"
        if root.suffix in _BY_SUFFIX:
            return _BY_SUFFIX[root.suffix]
        raise DataError(f"{root}: no such format; looked for {LOOKED_FOR}")
    found = [layout for layout, patterns in _PATTERNS.items() if _lies_in(root, patterns)]
    if (layout := only_layout(root, found)) is not None:
        return layout
    raise DataError(f"{root}: nothing found; looked for {LOOKED_FOR}")


def _lies_in(root: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a file of one of the patterns lies below a folder."""
    named = patterns[0] == METADATA
    return any(
        named or path.name != METADATA for pattern in patterns for path in root.glob(pattern)
    )
