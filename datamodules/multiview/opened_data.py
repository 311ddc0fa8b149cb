"""The scenes at a root: which are trained on, and which views of which are evaluated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import DataError
from datamodules.multiview.evaluation_index import Entry, index_entries, read_index, spread_entries
from datamodules.multiview.image_fit import ImageFit
from datamodules.multiview.readers.detection import Format, Layout, detect, open_splits
from datamodules.multiview.readers.protocol import SceneReader, SceneSplit
from datamodules.multiview.scene_filter import SceneFilter
from datamodules.multiview.view_source import ViewSource

if TYPE_CHECKING:
    from numpy.typing import NDArray

_INDEX_NAME = "evaluation_index.json"


class OpenedData:
    """Scenes at a root, opened when they are first asked for.

    Args:
        root: folder of the data.
        format: layout of the root, or auto.
        image_size: height and width of the views in pixels.
        exact_principal_point: see ``ImageFit``; None is exact for captures only.
        scenes: which training scenes are used.
        evaluation_index: file; None takes the root's evaluation_index.json, if there is one.
        evaluation_split: split whose scenes are evaluated.
        hold_out_every: every so many-th frame of a capture is kept for evaluation.
        context_views: context views of the evaluation of a capture without index.
        cache_bytes: splits that need no more memory than this are decoded once.
    """

    def __init__(
        self,
        root: Path,
        format: Format,
        *,
        image_size: tuple[int, int],
        exact_principal_point: bool | None,
        scenes: SceneFilter,
        evaluation_index: Path | None,
        evaluation_split: SceneSplit,
        hold_out_every: int,
        context_views: int,
        cache_bytes: int,
    ) -> None:
        self._root = root
        self._format = format
        self._image_size = image_size
        self._exact_principal_point = exact_principal_point
        self._scenes = scenes
        self._evaluation_index = evaluation_index
        self._wanted_split: SceneSplit = evaluation_split
        self._hold_out_every = hold_out_every
        self._context_views = context_views
        self._cache_bytes = cache_bytes
        self._sources: dict[SceneSplit, ViewSource] = {}

    @cached_property
    def layout(self) -> Layout:
        """How the scenes are stored; DataError if that is unclear."""
        return detect(self._root) if self._format == "auto" else self._format

    @property
    def is_capture(self) -> bool:
        """Whether the scenes are folders of photographs."""
        return self.layout in ("transforms", "colmap")

    @cached_property
    def _readers(self) -> Mapping[SceneSplit, SceneReader]:
        return open_splits(self._root, self.layout)

    @property
    def fit(self) -> ImageFit:
        """Size of the views and the rule for their principal point."""
        exact = self._exact_principal_point
        exact = self.is_capture if exact is None else exact
        return ImageFit(*self._image_size, exact)

    @property
    def fingerprint(self) -> str:
        """Text that changes with the files, the evaluation index or the size of the views."""
        parts = [f"{split}={reader.fingerprint}" for split, reader in self._readers.items()]
        parts.append(f"{self.fit}, {self.hold_out_every}")
        if self._index_file is not None:
            parts.append(hashlib.sha256(self._index_file.read_bytes()).hexdigest())
        return "; ".join(parts)

    @property
    def _index_file(self) -> Path | None:
        if self._evaluation_index is not None:
            return self._evaluation_index
        beside = self._root / _INDEX_NAME
        return beside if beside.is_file() else None

    @property
    def hold_out_every(self) -> int:
        """Every so many-th frame is held out, 0 where scenes or the data itself are split."""
        return 0 if self._index_file or "all" not in self._readers else self._hold_out_every

    @property
    def _evaluated_split(self) -> SceneSplit:
        wanted = self._wanted_split
        has_index = self._index_file is not None
        return wanted if has_index or wanted in self._readers else "val"

    def _split(self, split: SceneSplit) -> ViewSource:
        split = "all" if "all" in self._readers else split
        if split not in self._readers:
            raise DataError(
                f"{self._root}: no split {split} (found: {', '.join(self._readers)}); add it"
            )
        if split not in self._sources:
            self._sources[split] = ViewSource(self._readers[split], self.fit, self._cache_bytes)
        return self._sources[split]

    @property
    def training_source(self) -> ViewSource:
        """Views of the training split; DataError if there is none."""
        return self._split("train")

    @property
    def evaluation_source(self) -> ViewSource:
        """Views of the evaluated split; DataError if there is none."""
        return self._split(self._evaluated_split)

    @cached_property
    def evaluation_entries(self) -> Sequence[Entry]:
        """Scene and views of every sample of the evaluation.

        Raises:
            DataError: if the evaluation index does not match the data, or there must be one.
        """
        reader = self.evaluation_source.reader
        if self._index_file is not None:
            return index_entries(read_index(self._index_file), reader, self._index_file)
        if not self.is_capture:
            raise DataError(
                f"{self._root}: no evaluation index; set data.init_args.evaluation_index to a JSON "
                "{scene: {context: [...], target: [...]}} to validate and test, or "
                "trainer.limit_val_batches to 0"
            )
        return spread_entries(reader, self._context_views, self.hold_out_every)

    @cached_property
    def training_positions(self) -> NDArray[np.int64]:
        """Scenes to train on: those that pass the filter and are not evaluated.

        Raises:
            DataError: if there is none, or one cannot be checked.
        """
        reader = self.training_source.reader
        chosen = self._scenes.positions(reader)
        if self._index_file is None or "all" not in self._readers:
            return chosen
        evaluated = read_index(self._index_file)
        kept = [place for place in chosen.tolist() if reader.names[place] not in evaluated]
        if not kept:
            raise DataError(
                f"{self._root}: {self._index_file.name} names every scene, so none is left to "
                "train on; add scenes, or leave the index out to hold out frames instead"
            )
        return np.array(kept, dtype=np.int64)
