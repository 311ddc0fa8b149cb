"""The test of a token selector: one table of it and of every free alternative."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from torch import Tensor

from datamodules.documents.batch import DocumentBatch
from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.metrics.adaptivity import Adaptivity, measure_adaptivity
from lightning_modules.metrics.reduction_row import ReductionRow
from lightning_modules.metrics.reduction_study import (
    ReductionStudy,
    StudyImages,
    StudySettings,
)
from lightning_modules.metrics.short_training import ShortTraining
from lightning_modules.progress import progress_bar
from lightning_modules.reduction_results import (
    FIGURES,
    reduction_table,
    rivals,
    write_reduction,
)
from lightning_modules.token_reduction import TokenReduction
from models.token_reduction.baselines import BASELINES, Baseline
from models.token_reduction.learned_reduction import selector_reduction

SELECTOR, COVERED = "selector", "selector+coverage"
_WIDTH = 150


class ReductionTable(Callback):
    """Compares the selector with free reductions at several retained shares, in ``test``.

    For each method a reconstructor, a reader and a scene probe are trained on its own reductions;
    readers and probes trained on all tokens are asked too, as a consumer that knows nothing of the
    reduction would be. Prints the table, and writes it with its curves to ``<run>/reduction``.
    With several processes each rates some of the methods.

    Args:
        shares: Retained shares.
        coverage: Part of the kept tokens that the second selector row spends on an even grid.
        methods: Baselines that are rated; null takes all that the encoder allows.
        train_images: Training images for the judges.
        reconstructor_steps: Training of each method's reconstructor.
        reader_steps: Training of the reader of all tokens; each method's own goes on from it for
            a third of them.

    Raises:
        ValueError: If a number is out of range or a baseline unknown.
    """

    def __init__(
        self,
        shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
        coverage: float = 0.5,
        methods: tuple[str, ...] | None = None,
        train_images: int = 3072,
        reconstructor_steps: int = 120,
        reader_steps: int = 600,
    ) -> None:
        if not shares or not all(0 < share <= 1 for share in shares) or min(shares) == 1:
            raise ValueError(f"shares={shares}: must be shares in (0, 1], one below 1")
        if not 0 <= coverage <= 1:
            raise ValueError(f"coverage={coverage}: must be in [0, 1]")
        unknown = set(methods or ()) - set(BASELINES)
        if unknown:
            raise ValueError(f"methods={sorted(unknown)}: expected some of {', '.join(BASELINES)}")
        self.shares, self.coverage, self.methods = tuple(shares), coverage, methods
        self.train_images = train_images
        self.reconstructor_steps, self.reader_steps = reconstructor_steps, reader_steps
        self._test: list[dict[str, Tensor]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an earlier test gathered."""
        self._test = []

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Encode a batch."""
        if isinstance(pl_module, TokenReduction):
            self._test.append(_encode(pl_module, batch))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train the judges, print the table, and write it."""
        if not isinstance(pl_module, TokenReduction) or is_trial(trainer):
            return
        test = _on_all_ranks(trainer, self._test)
        data = trainer.datamodule  # type: ignore[attr-defined]
        data.setup("validate")
        train, held_out = (
            _on_all_ranks(trainer, _encode_all(trainer, pl_module, loader, self.train_images))
            for loader in (data.train_eval_dataloader(), data.val_dataloader())
        )
        adaptivity = measure_adaptivity(
            pl_module.reducer, held_out, test, self.shares, data.kind_names
        )
        with torch.inference_mode(False):  # judges are trained
            rows = self._rate_all(trainer, pl_module, train, test)
        for row in rows:
            if row.method == SELECTOR and row.share < 1:
                pl_module.log(f"test/nmse_{row.share:g}", row.nmse.value)
                pl_module.log(f"test/ocr_{row.share:g}", row.ocr.value)
        if trainer.is_global_zero:
            self._report(trainer, rows, adaptivity)

    def _rate_all(
        self,
        trainer: Trainer,
        module: TokenReduction,
        train: dict[str, Tensor],
        test: dict[str, Tensor],
    ) -> list[ReductionRow]:
        """Rows of all methods, each rated by one of the ranks."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        study = ReductionStudy(
            _study_images(module, train),
            _study_images(module, test),
            module.reducer.shape.grid,
            module.reconstructor,
            classes=len(data.region_names),
            scenes=len(data.scene_names),
            settings=self._settings(),
            half=trainer.precision == "bf16-mixed",
        )
        methods = list(self._methods(module).items())
        own = methods[trainer.global_rank :: trainer.world_size]
        rows: list[ReductionRow] = []
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with progress_bar(shown) as bar:
            task = bar.add_task("Training the judges", total=study.steps_of(len(own)))

            def advance() -> None:
                bar.advance(task)

            full = study.fit_full_probes(advance)
            for name, reduce in own:
                bar.update(task, description=f"Rating {name}")
                rows += study.rate(name, reduce, full, advance)
        order = [name for name, _ in methods]
        gathered = [row for part in gather_objects(trainer, rows) for row in part]
        return sorted(gathered, key=lambda row: (order.index(row.method), row.share))

    def _settings(self) -> StudySettings:
        return StudySettings(
            ShortTraining(self.reconstructor_steps),
            ShortTraining(self.reader_steps, 64, 3e-3, None, 0.05),
            ShortTraining(self.reader_steps // 3, 64, 1e-3, None, 0.05),
            self.shares,
        )

    def _methods(self, module: TokenReduction) -> dict[str, Baseline]:
        names = list(BASELINES) if self.methods is None else list(self.methods)
        if not module.encoder.has_class_token and self.methods is None:
            names.remove("cls_attention")
        methods: dict[str, Baseline] = {
            SELECTOR: selector_reduction(module.reducer),
            COVERED: selector_reduction(module.reducer, self.coverage),
        }
        return methods | {name: BASELINES[name] for name in names}

    def _report(
        self, trainer: Trainer, rows: list[ReductionRow], adaptivity: Sequence[Adaptivity]
    ) -> None:
        source = trainer.datamodule.source_name  # type: ignore[attr-defined]
        console = Console(width=max(Console().width, _WIDTH))
        console.print(reduction_table(rows, f"token reduction on {source}"))
        claims = rivals(rows, SELECTOR)
        claims += [row.describe() for row in adaptivity]
        for line in claims:
            console.print(line, highlight=False)
        run = Path(trainer.default_root_dir)
        calibrated = [row._asdict() for row in adaptivity]
        extra = {"source": source, "claims": claims, "adaptivity": calibrated}
        pictures = write_reduction(rows, run, extra, source)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                columns = ["method", "share", *FIGURES]
                table = [[row.method, row.share, *row.values(FIGURES)] for row in rows]
                logger.log_table("test/reduction", columns=columns, data=table)
                logger.log_image("test/curves", [str(path) for path in pictures])


def _encode(module: TokenReduction, batch: DocumentBatch) -> dict[str, Tensor]:
    """Raw features of a batch with its labels, on the module's device."""
    encoded = module.encoder(batch["image"], attention=module.encoder.has_class_token)
    fields = {"tokens": encoded.tokens.float()}
    if encoded.cls_attention is not None:
        fields["cls_attention"] = encoded.cls_attention
    names = ("index", "kind", "region", "item_token", "scene", "complexity")
    labels: Mapping[str, Any] = batch
    return fields | {name: labels[name] for name in names}


def _encode_all(
    trainer: Trainer, module: TokenReduction, loader: Iterable[DocumentBatch], most: int
) -> list[dict[str, Tensor]]:
    """Features of a loader's images, at most so many on all ranks together."""
    parts: list[dict[str, Tensor]] = []
    left = -(-most // trainer.world_size)
    for batch in loader:
        with trainer.precision_plugin.forward_context():
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            parts.append({name: v[:left] for name, v in _encode(module, batch).items()})
        left -= len(parts[-1]["index"])
        if left <= 0:
            break
    return parts


def _study_images(module: TokenReduction, fields: dict[str, Tensor]) -> StudyImages:
    """Standardised features that gradients may pass through, which those of a test may not."""
    tokens = module.reducer.standardiser(fields["tokens"])
    found = (tokens, fields.get("cls_attention"), fields["region"], fields["item_token"])
    copies = [None if field is None else field.clone() for field in (*found, fields["scene"])]
    return StudyImages(*copies)  # type: ignore[arg-type]


def _on_all_ranks(trainer: Trainer, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Features of all ranks in the data's order, every image once, on this rank's device."""
    own = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    ranks = gather_objects(trainer, own)
    joined = {name: torch.cat([rank[name] for rank in ranks]) for name in own}
    index = joined["index"]
    order = index.argsort(stable=True)
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[order][1:] != index[order][:-1]
    device = trainer.strategy.root_device
    return {name: value[order[first]].to(device) for name, value in joined.items()}


def gather_objects(trainer: Trainer, own: Any) -> list[Any]:  # noqa: ANN401
    """What every rank has, in the order of ranks."""
    if trainer.world_size == 1:
        return [own]
    gathered: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(gathered, own)
    return gathered
