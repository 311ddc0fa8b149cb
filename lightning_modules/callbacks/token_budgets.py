"""Test table of CLiFT: quality, size, cost and time at every token budget, beside baselines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from torch import Tensor

from datamodules.multiview.batch import MultiviewBatch
from lightning_modules.callbacks.plane_depth import best_plane_depth
from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.clift import Clift, EncodedScenes, Storage
from lightning_modules.metrics.image_quality import PerceptualDistance, SceneMean, psnr, ssim
from lightning_modules.pictures import write_png
from lightning_modules.rate_distortion import (
    RateRow,
    draw_rate_distortion,
    draw_speed,
    megabytes_of,
    rate_table,
    write_rates,
)
from models.clift.baselines import copy_nearest, mean_context, warp_plane
from models.clift.clift import SceneTokens
from models.clift.cost import render_macs
from models.clift.selection import nearest_tokens, score_for_views

_NAMES: dict[Storage, str] = {
    "random": "random tokens",
    "kmeans": "K-means",
    "mean": "cluster mean",
    "condensed": "K-means + condenser",
}
_ALL, _NEAREST = "all tokens", "all tokens, nearest to the view"
_COPY, _MEAN, _PLANE = "nearest view copied", "mean of the views", "nearest view warped by a plane"
# Columns of the terminal that the table needs.
_WIDTH = 120


class _Case(NamedTuple):
    """One row of the table; shares, as the counts may differ between scenes and ranks."""

    method: str
    stored: float | None = None
    rendered: float | None = None


class _Tally:
    """What is known of one row so far."""

    def __init__(self, num_scenes: int, device: torch.device) -> None:
        self.psnr, self.ssim, self.distance = (SceneMean(num_scenes).to(device) for _ in range(3))
        self.seconds, self.views = 0.0, 0
        self.stored, self.rendered = 0, 0  # most tokens of any scene


class TokenBudgets(Callback):
    """Renders every test scene at every budget, prints one table and draws its curves.

    Rows: tokens chosen at random, K-means anchors, cluster means and, in stage 2, condensed ones
    at each storage budget; all tokens, and of them the nearest to each view at each rendering
    budget; and three baselines without learning. The plane's depth is chosen for each scene by
    warping its context views onto one another, so no target is looked at.

    Writes ``rate_distortion/`` (csv, json, png and the values of every scene) and pictures.

    Args:
        shares: Stored tokens as shares of all.
        view_shares: Tokens rendered from as shares of all, chosen anew for each view.
        measure_distance: Whether to measure a perceptual distance, which takes the most time.
    """

    def __init__(
        self,
        shares: tuple[float, ...] = (0.5, 0.25, 0.125, 0.0625),
        view_shares: tuple[float, ...] = (0.75, 0.5, 0.25, 0.125),
        measure_distance: bool = True,
    ) -> None:
        for name, values in (("shares", shares), ("view_shares", view_shares)):
            if not all(0 < share <= 1 for share in values):
                raise ValueError(f"{name}={values}: must be shares in (0, 1]")
        self.shares, self.view_shares = tuple(shares), tuple(view_shares)
        self.measure_distance = measure_distance
        self._tallies: dict[_Case, _Tally] = {}
        self._distance: PerceptualDistance | None = None
        self._to_truth: Callable[[Tensor], Tensor] | None = None  # of the batch at hand
        self._image_size = (0, 0)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an earlier test measured."""
        if not isinstance(pl_module, Clift):
            raise TypeError(f"{type(pl_module).__name__}: TokenBudgets measures CLiFT only")
        self._tallies = {}
        self._distance = PerceptualDistance() if self.measure_distance else None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure every case on one batch."""
        if not isinstance(pl_module, Clift):
            return
        scenes = len(trainer.test_dataloaders.dataset)  # type: ignore[union-attr]
        truth = batch["target"]["image"]
        self._image_size = tuple(truth.shape[-2:])
        self._to_truth = None if self._distance is None else self._distance.from_truth(truth)
        with trainer.precision_plugin.forward_context():
            encoded = pl_module.encode(batch)
            self._measure_storage(pl_module, encoded, batch, scenes)
            self._measure_views(pl_module, encoded, batch, scenes)
        for method, pictures in _baselines(batch).items():
            self._add(_Case(method), pictures, batch, scenes)

    def _measure_storage(
        self, module: Clift, encoded: EncodedScenes, batch: MultiviewBatch, scenes: int
    ) -> None:
        methods: list[Storage] = ["random", "kmeans", "mean"]
        if module.network.squeezer is not None:
            methods.append("condensed")
        for share in self.shares:
            for method in methods:
                # Equal keys: the clusters of the last three are the same.
                generator = module.evaluation_generator(int(batch["index"][0]))
                stored = module.store(encoded, method, share, generator)
                case = _Case(_NAMES[method], share, share)
                self._render(module, case, stored, batch, scenes)

    def _measure_views(
        self, module: Clift, encoded: EncodedScenes, batch: MultiviewBatch, scenes: int
    ) -> None:
        total = encoded.tokens.shape[1]
        everything = SceneTokens(*encoded)
        self._render(module, _Case(_ALL, 1.0, 1.0), everything, batch, scenes)
        cameras = (batch["target"]["intrinsics"], batch["target"]["pose"])
        scores = score_for_views(encoded.rays, encoded.camera, *cameras, *self._image_size)
        for share in self.view_shares:
            keep = max(1, int(total * share))
            positions = nearest_tokens(scores, keep, encoded.valid[:, None])
            case = _Case(_NEAREST, 1.0, share)
            self._render(module, case, everything, batch, scenes, positions)

    def _render(
        self,
        module: Clift,
        case: _Case,
        stored: SceneTokens,
        batch: MultiviewBatch,
        scenes: int,
        positions: Tensor | None = None,
    ) -> None:
        memory = module.remember(stored)
        if positions is not None:
            memory = memory.take(positions)
        start = _now(module.device)
        pictures = module.render(memory, batch["target"])
        seconds = _now(module.device) - start
        self._add(case, pictures, batch, scenes)
        tally = self._tallies[case]
        count = int(stored.valid.sum(1).max())
        tally.stored = max(tally.stored, count)
        tally.rendered = max(tally.rendered, count if positions is None else positions.shape[-1])
        tally.seconds += seconds
        tally.views += int(batch["target"]["valid"].numel())

    def _add(self, case: _Case, pictures: Tensor, batch: MultiviewBatch, scenes: int) -> None:
        tally = self._tallies.get(case)
        if tally is None:
            tally = self._tallies[case] = _Tally(scenes, pictures.device)
        truth, valid = batch["target"]["image"], batch["target"]["valid"]
        shown = batch["index"].unsqueeze(1).expand_as(valid)[valid]  # scene of each view there is
        metrics = [(tally.psnr, psnr), (tally.ssim, ssim)]
        for metric, measure in metrics:
            metric.update(shown, measure(pictures, truth)[valid])
        if self._to_truth is not None:
            tally.distance.update(shown, self._to_truth(pictures)[valid])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, write it, and draw its curves."""
        if not isinstance(pl_module, Clift):
            return
        rows, values = [], {}
        for case, tally in self._tallies.items():
            tally.stored, tally.rendered = _largest(trainer, tally.stored, tally.rendered)
            rows.append(self._row(case, tally, pl_module))
            parts = (case.method, rows[-1].stored_tokens, rows[-1].rendered_tokens)
            name = "; ".join(str(part) for part in parts)
            values[name] = tally.psnr.per_scene().tolist()
        for row in rows:
            pl_module.log(f"test/psnr/{_slug(row)}", row.psnr, sync_dist=True)
        if trainer.is_global_zero and not is_trial(trainer):
            self._report(trainer, rows, values)

    def _row(self, case: _Case, tally: _Tally, module: Clift) -> RateRow:
        distance = None if self._distance is None else float(tally.distance.compute())
        quality = (float(tally.psnr.compute()), float(tally.ssim.compute()), distance)
        if case.stored is None:
            return RateRow(case.method, None, None, *quality)
        macs = render_macs(module.shape, self._image_size, tally.rendered)
        return RateRow(
            case.method,
            tally.stored,
            tally.rendered,
            *quality,
            megabytes=megabytes_of(tally.stored, module.shape.width),
            gmacs_linear=macs.linear / 1e9,
            gmacs=macs.total / 1e9,
            milliseconds=1e3 * tally.seconds / max(tally.views, 1),
        )

    def _report(
        self, trainer: Trainer, rows: list[RateRow], values: dict[str, list[float]]
    ) -> None:
        name = self._distance.name if self._distance else "distance"
        source = getattr(getattr(trainer, "datamodule", None), "source_name", "")
        title = f"views of {source} scenes" if source else ""
        width = max(Console().width, _WIDTH)
        Console(width=width).print(rate_table(rows, name, title))
        run = Path(trainer.default_root_dir)
        write_rates(rows, run / "rate_distortion", name)
        per_scene = run / "rate_distortion" / "psnr_per_scene.json"
        per_scene.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        drawn = {
            "rate-distortion": draw_rate_distortion(rows, title),
            "speed": draw_speed([row for row in rows if row.method in (_ALL, _NEAREST)], title),
        }
        for file, picture in drawn.items():
            write_png(picture, run / "pictures" / f"{file}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                columns = list(RateRow.__dataclass_fields__)
                table = [[getattr(row, column) for column in columns] for row in rows]
                logger.log_table("test/rate_distortion", columns=columns, data=table)
                logger.log_image("test/curves", list(drawn.values()))


def _baselines(batch: MultiviewBatch) -> dict[str, Tensor]:
    """Target views made without learning, by name."""
    context, target = batch["context"], batch["target"]
    images, poses, valid = context["image"], context["pose"], context["valid"]
    views = target["image"].shape[1]
    plane = warp_plane(
        images,
        poses,
        context["intrinsics"],
        target["pose"],
        target["intrinsics"],
        best_plane_depth(context),
        valid,
    )
    return {
        _COPY: copy_nearest(images, poses, target["pose"], valid),
        _MEAN: mean_context(images, views, valid),
        _PLANE: plane,
    }


def _largest(trainer: Trainer, *counts: int) -> list[int]:
    """The largest of each count on any rank."""
    own = torch.tensor(counts, device=trainer.strategy.root_device)
    largest = torch.as_tensor(trainer.strategy.reduce(own, reduce_op="max"))
    return [int(count) for count in largest]


def _slug(row: RateRow) -> str:
    words = row.method.replace("+", "and").replace(",", "").replace(" ", "_").lower()
    return words if row.rendered_tokens is None else f"{words}_{row.rendered_tokens}"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
