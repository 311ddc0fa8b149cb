"""The last thing a run prints: its metrics as a table, then where everything lies."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table

from lightning_modules.callbacks.run_checkpoint import is_trial

_MOST_PICTURES = 6


class RunSummary(Callback):
    """Prints metrics and paths when a stage ends, and keeps them as ``<stage>_metrics.json``."""

    def __init__(self) -> None:
        self._started = time.time()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember when the stage began: pictures made since then are its own."""
        self._started = time.time() - 1.0  # some file systems keep whole seconds only

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the summary of a stage that went through."""
        if trainer.interrupted or not trainer.is_global_zero or is_trial(trainer):
            return
        stage = str(trainer.state.fn.value) if trainer.state.fn else stage
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        run = Path(trainer.default_root_dir)
        console = Console()
        if metrics:
            console.print(_metrics_table(metrics, stage))
        if stage in ("test", "validate"):
            _write_json(run / f"{stage}_metrics.json", metrics)
        for label, path in self._places(trainer, run, stage):
            console.print(f"{label:<16} {path}", soft_wrap=True, highlight=False, markup=False)

    def _places(self, trainer: Trainer, run: Path, stage: str) -> list[tuple[str, str]]:
        places = [("pictures", str(path)) for path in self._new_pictures(run)]
        if stage in ("test", "validate"):
            places.append((f"{stage} metrics", str(run / f"{stage}_metrics.json")))
        if stage == "predict":
            places += [("predictions", str(path)) for path in sorted(run.glob("predictions*"))]
        if (run / "metrics.csv").is_file():
            places.append(("metrics", str(run / "metrics.csv")))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                places.append(_wandb_place(logger))
        if stage == "fit" and any(run.glob("checkpoints/*.ckpt")):
            places.append(("test it", f"python train.py test --resume {run}"))
            if not _is_complete(trainer):
                places.append(("resume", f"python train.py fit --resume {run}"))
        return places

    def _new_pictures(self, run: Path) -> list[Path]:
        made = [p for p in run.glob("pictures/**/*.png") if p.stat().st_mtime >= self._started]
        return sorted(made, key=lambda path: path.stat().st_mtime)[-_MOST_PICTURES:]


def _is_complete(trainer: Trainer) -> bool:
    """Say whether training has gone as far as it was asked to; resuming would do nothing."""
    if trainer.max_steps not in (None, -1) and trainer.global_step >= trainer.max_steps:
        return True
    return trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs


def _metrics_table(metrics: dict[str, float], stage: str) -> Table:
    table = Table(title=f"{stage} metrics")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name in sorted(metrics):
        table.add_row(
            name, f"{metrics[name]:.4f}" if abs(metrics[name]) >= 1e-3 else f"{metrics[name]:.3g}"
        )
    return table


def _write_json(file: Path, metrics: dict[str, float]) -> None:
    """Write metrics; JSON has no NaN, so what is not finite becomes null."""
    plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    file.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _wandb_place(logger: WandbLogger) -> tuple[str, str]:
    run = logger.experiment
    if not run.offline and run.url:  # W&B warns when an offline run is asked for its address
        return "W&B", run.url
    return "W&B (offline)", _short(str(run.settings.sync_dir))


def _short(path: str) -> str:
    """Return a path relative to the working directory where that is shorter."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
