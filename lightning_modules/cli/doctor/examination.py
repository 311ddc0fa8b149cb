"""The examination itself: one check after the other, the cheap and the decisive ones first."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightning_modules.cli.doctor.findings import Finding, Report
from lightning_modules.cli.doctor.versions import examine_versions, read_needs
from lightning_modules.cli.errors import ReportedError
from lightning_modules.cli.invocation import Invocation, read_invocation

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    from lightning_modules.cli.doctor.parts import ConfiguredParts

_HELP = """\
python train.py doctor --config FILE.yaml [--config MORE.yaml ...] [--KEY VALUE ...]
python train.py doctor --resume RUN_DIR

Checks what `fit` with the same arguments would need, without training: versions, settings, data,
weight files, checkpoints, devices, memory, disk, W&B. Exit status 0, or 2 if something is missing.
"""
# A model that cannot be counted without being built is built if its files take no more of the
# free memory than this share.
_BUILT_SHARE = 0.25


class ModelSize(NamedTuple):
    """Bytes of a model.

    Attributes:
        checkpoint: Of one checkpoint.
        training: Weights, gradients and optimiser state.
    """

    checkpoint: int
    training: int


def examine(arguments: Sequence[str]) -> int:
    """Examine what ``fit`` would do with these arguments, and print a line for each finding.

    Args:
        arguments: Those of ``fit``.

    Returns:
        The exit status: 0, or 2 if a finding is a failure.
    """
    if set(arguments) & {"-h", "--help"}:
        print(_HELP, end="")
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an examination downloads nothing
    report = Report()
    report.add(examine_versions(read_needs()))
    if not arguments:
        report.add([Finding("warn", "settings", "none given: add --config FILE.yaml")])
        return report.close("python train.py fit --config FILE.yaml")
    try:
        invocation = read_invocation(["fit", *arguments])
        # Torch and Lightning may be what is missing.
        from lightning_modules.cli.doctor.parts import ConfiguredParts
        from lightning_modules.cli.quiet import hush_advertisements

        hush_advertisements()
        _hush_lightning()
        parts = ConfiguredParts(invocation)
    except (ReportedError, ImportError) as error:
        report.add([Finding("fail", "settings", " ".join(str(error).split()))])
    else:
        report.add([Finding("ok", "settings", _summary(parts))])
        with tempfile.TemporaryDirectory(prefix="quintet-doctor-") as folder:
            report.add(_Examination(invocation, parts, Path(folder)).run())
    return report.close(" ".join(["python train.py fit", *arguments]))


def _hush_lightning() -> None:
    """Keep Lightning's notes on seeds and devices out of the report; its warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _summary(parts: ConfiguredParts) -> str:
    names = [parts.section[key].class_path.rpartition(".")[2] for key in ("model", "data")]
    return f"{' on '.join(names)}: every key and type is right"


class _Examination:
    """The checks of a configuration that could be read."""

    def __init__(self, invocation: Invocation, parts: ConfiguredParts, folder: Path) -> None:
        from lightning_modules.cli.doctor import files, machine

        self._invocation, self._parts, self._folder = invocation, parts, folder
        self._files, self._machine = files, machine
        self._weights = files.named_paths(parts.section.model)
        self._batch_bytes = 0
        self._is_missing = False

    def run(self) -> Iterator[Finding]:
        """All findings, in the order in which they help."""
        section, machine = self._parts.section, self._machine
        devices = machine.choose_devices(section.trainer)
        yield from machine.examine_devices(devices)
        yield from machine.examine_wandb(section.trainer)
        for finding in self._files.examine_weights(self._weights, "model"):
            self._is_missing = self._is_missing or finding.verdict == "fail"
            yield finding
        trainer = yield from self._examine_trainer()
        data = yield from self._examine_data(trainer)
        model = yield from self._examine_model(data)
        if self._invocation.resume is not None:
            yield from self._examine_resume(self._invocation.resume, model)
        size = None if model is None else _measure(model, trainer, str(section.trainer.precision))
        if size is not None:
            yield machine.examine_memory(devices, size.training, self._batch_bytes)
        keep = section.checkpoint.keep
        yield machine.examine_disk(Path(section.runs_dir), size and size.checkpoint, keep)

    def _examine_trainer(self) -> Generator[Finding, None, Trainer | None]:
        from lightning_modules.cli.doctor.parts import UnbuiltPart

        try:
            trainer = self._parts.build_trainer(self._folder)
        except UnbuiltPart as problem:
            yield Finding("fail", "trainer", str(problem))
            return None
        names = [type(callback).__name__ for callback in self._parts.own_callbacks(trainer)]
        yield Finding("ok", "trainer", f"with {', '.join(names)}" if names else "no callbacks")
        return trainer

    def _examine_data(
        self, trainer: Trainer | None
    ) -> Generator[Finding, None, LightningDataModule | None]:
        from lightning_modules.cli.doctor.batches import BatchReader
        from lightning_modules.cli.doctor.parts import UnbuiltPart

        try:
            data = self._parts.build_data()
        except UnbuiltPart as problem:
            yield Finding("fail", "data", str(problem))
            return None
        if trainer is not None:
            reader = BatchReader(data, trainer)
            yield from reader.examine()
            self._batch_bytes = reader.largest
            return data if reader.can_train else None
        return data

    def _examine_model(
        self, data: LightningDataModule | None
    ) -> Generator[Finding, None, LightningModule | None]:
        """Build the model without its memory, or, where that cannot be, a small one really."""
        from lightning_modules.cli.doctor.parts import UnbuiltPart

        if self._is_missing:
            yield Finding("warn", "model", "not built: its weights are not all there")
            return None
        try:
            try:
                model = self._parts.build_model(data, "meta")
            except (NotImplementedError, UnbuiltPart):
                if not self._can_be_built():
                    detail = "too large to be built for a look; its memory is not estimated"
                    yield Finding("warn", "model", f"{detail}")
                    return None
                model = self._parts.build_model(data, "cpu")
        except (NotImplementedError, UnbuiltPart) as problem:
            yield Finding("fail" if data is not None else "warn", "model", str(problem))
            return None
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        detail = f"{total:,} parameters, of which {trained:,} are trained"
        guess = "" if data is not None else " (sizes by the settings, without the data)"
        yield Finding("ok", "model", detail + guess)
        return model

    def _can_be_built(self) -> bool:
        free = self._machine.available_memory()
        size = sum(self._files.measure_weights(path) for path in self._weights.values())
        return free is not None and size < _BUILT_SHARE * free

    def _examine_resume(self, run: Path, model: LightningModule | None) -> Iterator[Finding]:
        from lightning_modules.cli.resume import check_fit

        newest = yield from self._files.examine_checkpoints(run)
        if model is None or newest is None:
            return
        try:
            check_fit(str(newest), model)
        except ReportedError as problem:
            yield Finding("fail", "checkpoints", str(problem))


def _measure(model: LightningModule, trainer: Trainer | None, precision: str) -> ModelSize:
    """Bytes of a model with AdamW's two moments, and with an average of its weights if kept."""
    from lightning.pytorch.callbacks import WeightAveraging

    from lightning_modules.callbacks.moving_average import MovingAverage

    share = 0.5 if precision.endswith("-true") and precision.startswith(("bf16", "16")) else 1.0
    parameters = list(model.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    callbacks = trainer.callbacks if trainer is not None else []  # type: ignore[attr-defined]
    averages = sum(
        trained if isinstance(callback, MovingAverage) else weights  # Lightning's copies all
        for callback in callbacks
        if isinstance(callback, WeightAveraging)
    )
    moments = 2 * trained
    return ModelSize(
        int(share * (stored + moments + averages)),
        int(share * (weights + trained + moments + averages)),
    )
