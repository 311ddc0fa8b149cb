"""Pictures of what a selector keeps, and the kept tokens' places as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lightning_modules.callbacks.reduction_table import gather_objects
from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.pictures import draw_grid, to_pil, write_png
from lightning_modules.text_files import write_text
from lightning_modules.token_reduction import TokenReduction
from models.token_reduction.selection import Selection, select

_SHEET_ROWS = 12
# How much of a dropped patch is still seen.
_FADED = 0.2


class SelectionOverlays(BasePredictionWriter):
    """Writes ``<run>/predictions/``: overlays, a sheet, and ``index.json``.

    ``000042.png`` shows image 42, its scores as a heat map (blue low, red high) and what each share
    keeps, the rest faded; ``sheet.png`` the first dozen of them. ``index.json`` reads ``{"grid",
    "source", "encoder", "images": [{"index", "file", "scores", "kept": {share: [places]}}]}``,
    places counted in raster order from 0.

    Args:
        shares: Retained shares that are shown.
        coverage: Part of the kept tokens that goes to an even grid.
        folder: Name of the folder in the run directory.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        shares: tuple[float, ...] = (0.1, 0.3, 0.5),
        coverage: float = 0.0,
        folder: str = "predictions",
    ) -> None:
        super().__init__(write_interval="batch")
        if not shares or not all(0 < share <= 1 for share in shares):
            raise ValueError(f"shares={tuple(shares)}: must be shares in (0, 1]")
        if not 0 <= coverage <= 1:
            raise ValueError(f"coverage={coverage}: must be in [0, 1]")
        self.shares, self.coverage, self.folder = tuple(shares), coverage, folder
        self._images: list[dict[str, Any]] = []
        self._rows: list[tuple[str, Tensor]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an earlier call wrote."""
        if not isinstance(pl_module, TokenReduction):
            raise TypeError(f"{type(pl_module).__name__}: SelectionOverlays shows TokenReduction")
        self._images, self._rows = [], []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,  # noqa: ANN401
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the pictures of one batch."""
        if is_trial(trainer) or not isinstance(pl_module, TokenReduction):
            return
        scores = prediction.scores
        images = batch["image"].float()
        grid = pl_module.encoder.grid(*images.shape[-2:])
        kept = [self._selection(scores, share, grid) for share in self.shares]
        panels = [images, heat_map(scores, grid, images)]
        panels += [fade_dropped(images, selection.mask, grid) for selection in kept]
        rows = torch.stack(panels, 1).cpu()  # (B, panels, 3, H, W)
        for place, number in enumerate(batch["index"].tolist()):
            file = f"{number:06d}.png"
            wide = torch.cat(list(rows[place]), -1)  # (3, H, panels * W)
            write_png(to_pil(wide), self._directory(trainer) / file)
            places = {
                f"{share:g}": selection.indices[place][selection.valid[place]].tolist()
                for share, selection in zip(self.shares, kept, strict=True)
            }
            values = [round(value, 4) for value in scores[place].tolist()]
            self._images.append({"index": number, "file": file, "scores": values, "kept": places})
            if len(self._rows) < _SHEET_ROWS:
                self._rows.append(("", rows[place]))

    def _selection(self, scores: Tensor, share: float, grid: tuple[int, int]) -> Selection:
        return select(scores[..., None], scores, share=share, coverage=self.coverage, grid=grid)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the sheet and the index of all ranks' images."""
        if is_trial(trainer) or not isinstance(pl_module, TokenReduction):
            return
        ranks = gather_objects(trainer, self._images)
        if not trainer.is_global_zero:
            return
        images = {image["index"]: image for rank in ranks for image in rank}
        content = {
            "grid": pl_module.reducer.shape.grid,
            "source": trainer.datamodule.source_name,  # type: ignore[attr-defined]
            "encoder": pl_module.encoder.identity,
            "images": [images[number] for number in sorted(images)],
        }
        directory = self._directory(trainer)
        write_text(directory / "index.json", json.dumps(content) + "\n")
        if self._rows:
            names = ["image", "score", *(f"keep {share:g}" for share in self.shares)]
            sheet = draw_grid(self._rows, columns=names)
            write_png(sheet, directory / "sheet.png")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image("predict/selection", [sheet])

    def _directory(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.folder


def heat_map(scores: Tensor, grid: tuple[int, int], images: Tensor) -> Tensor:
    """Scores (B, L) as colours over darkened images (B, 3, H, W): (B, 3, H, W) in [-1, 1].

    Blue is each image's lowest score, red its highest.
    """
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    level = _planes((scores - low) / (high - low).clamp(min=1e-6), grid, images)  # (B, 1, H, W)
    colours = torch.cat([level, 1 - (2 * level - 1).abs(), 1 - level], 1)
    grey = images.mean(1, keepdim=True) / 2 + 0.5
    return (colours * (0.4 + 0.6 * grey)) * 2 - 1


def fade_dropped(images: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] whose patches outside a mask (B, L) are nearly white."""
    kept = _planes(mask.float(), grid, images)
    seen = _FADED + (1 - _FADED) * kept
    return images * seen + (1 - seen)


def _planes(values: Tensor, grid: tuple[int, int], images: Tensor) -> Tensor:
    """One value for each token (B, L) as planes (B, 1, H, W), each token its own rectangle."""
    planes = values.reshape(len(values), 1, *grid).to(images)
    return F.interpolate(planes, tuple(images.shape[-2:]), mode="nearest-exact")
