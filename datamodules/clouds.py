"""Clouds from the user's own files, one a batch, for prediction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.cloud_files import find_clouds, read_cloud
from datamodules.errors import DataError
from datamodules.loading import OrderedLoader
from datamodules.module_loaders import ordered_loader
from datamodules.paired_2d3d.geometry_augmentation import coord_origin
from datamodules.paired_2d3d.normals import neighbour_normals
from datamodules.paired_2d3d.voxel_sampling import sample_voxels, voxel_cells, voxel_inverse

if TYPE_CHECKING:
    from numpy.typing import NDArray

Axis = Literal["x", "y", "z"]
# Axes of the file that become x, y and z: turns, never mirrors.
_TURNS: dict[Axis, tuple[int, int, int]] = {"z": (0, 1, 2), "y": (2, 0, 1), "x": (1, 2, 0)}


class CloudFileBatch(TypedDict):
    """One cloud: n points after voxelisation, M points of the file.

    Attributes:
        coord: (n, 3) float32 metres, z up; x and y from the middle, z from the lowest point.
        colour: (n, 3) float32, RGB in [0, 1]; 0 where the file has none.
        normal: (n, 3) float32; 0 where there are none.
        offset: (1,) int64, n.
        grid_coord: (n, 3) int64, voxel of each point.
        inverse: (M,) int64, row that stands for each point of the file.
        original_coord: (M, 3) float64, as in the file.
        name: Unique name of the cloud, from its file.
        notes: Lines about what the file lacked.
    """

    coord: Tensor
    colour: Tensor
    normal: Tensor
    offset: Tensor
    grid_coord: Tensor
    inverse: Tensor
    original_coord: Tensor
    name: str
    notes: list[str]


class CloudFiles(LightningDataModule):
    """Clouds of points from PLY, LAS, npz or Pointcept scene folders, for ``predict``.

    Args:
        path: a file, a scene folder, or a folder of these.
        grid_size: side of a voxel in metres; that of the encoder's training.
        unit: metres that one unit of the file is.
        up: axis of the file that points up.
        normals: what stands for normals that a file lacks: estimate (from the neighbours of each
            point, pointing to the middle of the cloud) or zero.
        num_workers: loading processes; 0 loads in this process.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if there is no cloud at the path.
    """

    def __init__(
        self,
        path: Path,
        grid_size: float = 0.02,
        unit: float = 1.0,
        up: Axis = "z",
        normals: Literal["estimate", "zero"] = "estimate",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("grid_size", grid_size), ("unit", unit)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: must be > 0 (data.init_args.{name})")
        if num_workers < 0:
            raise ValueError(
                f"num_workers={num_workers}: must be >= 0 (data.init_args.num_workers)"
            )
        self.paths = find_clouds(Path(path))
        self.grid_size = grid_size
        self.unit = unit
        self.up: Axis = up
        self.estimate_normals = normals == "estimate"
        self.num_workers = num_workers

    def predict_dataloader(self) -> OrderedLoader:
        """``CloudFileBatch``es in the order of names."""
        return ordered_loader(self, _FileClouds(self), 1)


class _FileClouds(Dataset[CloudFileBatch]):
    """Clouds of a `CloudFiles`."""

    def __init__(self, data: CloudFiles) -> None:
        self._paths = data.paths
        self._grid_size = data.grid_size
        self._unit = data.unit
        self._axes = list(_TURNS[data.up])
        self._estimate = data.estimate_normals

    def __len__(self) -> int:
        """Number of clouds."""
        return len(self._paths)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> CloudFileBatch:
        """The cloud of the first of the given (index, epoch) pairs."""
        if len(pairs) != 1:
            raise ValueError(f"{len(pairs)} clouds: a batch is one; use as many devices as divide")
        return self[pairs[0]]

    def __getitem__(self, pair: tuple[int, int]) -> CloudFileBatch:
        """The cloud given as (index, epoch)."""
        path = self._paths[pair[0]]
        points = read_cloud(path)
        turned = points.coord[:, self._axes] * self._unit
        # The shift comes first: float32 has no room for coordinates of maps.
        metres = (turned - turned.min(axis=0)).astype(np.float32)
        metres -= coord_origin(metres)
        try:
            rows = sample_voxels(metres, self._grid_size, None)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
        coord = metres[rows]
        notes: list[str] = []
        colour = _rows_or_zeros(points.colour, rows) / np.float32(255)
        normal = _rows_or_zeros(points.normal, rows)[:, self._axes]
        if points.colour is None:
            notes.append(f"{path.name}: no colours, the encoder sees black")
        if points.normal is None:
            notes.append(f"{path.name}: no normals, {'estimated' if self._estimate else 'zero'}")
            normal = _estimated(coord) if self._estimate else normal
        return {
            "coord": torch.from_numpy(coord),
            "colour": torch.from_numpy(colour),
            "normal": torch.from_numpy(np.ascontiguousarray(normal)),
            "offset": torch.tensor([len(rows)]),
            "grid_coord": torch.from_numpy(voxel_cells(coord, self._grid_size)),
            "inverse": torch.from_numpy(voxel_inverse(metres, self._grid_size)),
            "original_coord": torch.from_numpy(points.coord),
            "name": self._name(path),
            "notes": notes,
        }

    def _name(self, path: Path) -> str:
        """Stem of the file, with its suffix if another file has the same stem."""
        stems = [other.stem for other in self._paths]
        return path.stem if stems.count(path.stem) == 1 else path.name


def _rows_or_zeros(
    values: NDArray[np.generic] | None, rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The chosen rows as float32 (n, 3), zeros if there are none."""
    if values is None:
        return np.zeros((len(rows), 3), dtype=np.float32)
    return values[rows].astype(np.float32)


def _estimated(coord: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normals (n, 3) by the neighbours, pointing to the middle of the cloud's box."""
    points = coord.astype(np.float64)
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    return neighbour_normals(points, middle - points).astype(np.float32)
