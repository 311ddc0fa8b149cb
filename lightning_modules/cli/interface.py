"""The command-line interface: Lightning's, with run directories, resume and safe checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_modules.callbacks.finite_loss import FiniteLoss
from lightning_modules.callbacks.graceful_stop import GracefulStop
from lightning_modules.callbacks.parameter_summary import ParameterSummary
from lightning_modules.callbacks.run_checkpoint import RunCheckpoint, is_trial
from lightning_modules.callbacks.run_record import RunRecord
from lightning_modules.callbacks.run_summary import RunSummary
from lightning_modules.callbacks.step_seed import StepSeed
from lightning_modules.callbacks.training_bar import TrainingBar
from lightning_modules.cli.checkpoint_io import VerifiedCheckpointIO
from lightning_modules.cli.csv_logger import RunCSVLogger
from lightning_modules.cli.diagnosis import explain
from lightning_modules.cli.errors import ConfigError, StopRequested
from lightning_modules.cli.instantiation import explain_construction
from lightning_modules.cli.invocation import Invocation
from lightning_modules.cli.linked_values import LINKED_TO_DATA, check_links, linked_values
from lightning_modules.cli.lost_process import reported_loss
from lightning_modules.cli.resume import check_fit, choose_checkpoint, choose_run
from lightning_modules.cli.run_directory import RunDirectory, is_zero_rank
from lightning_modules.cli.settings import find_place
from lightning_modules.cli.signals import StopRequests
from lightning_modules.cli.wandb_loggers import leave_out_unset, place_loggers

LIGHTNING_OPTIONS: dict[str, Any] = {
    "model_class": LightningModule,
    "datamodule_class": LightningDataModule,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "seed_everything_default": 0,
    "trainer_defaults": {"use_distributed_sampler": False, "num_sanity_val_steps": 0},
    "auto_configure_optimizers": False,  # each method sets up its own schedule
    "save_config_callback": None,  # RunRecord saves it
}
"""What Quintet asks of LightningCLI."""

# Settings of one call, which a later call with the saved configuration is not to repeat.
_CALL_ONLY = ("config", "resume", "ckpt_path", "weights_only", "verbose", "return_predictions")


class RejectedConfig(Exception):
    """jsonargparse's verdict on a configuration, in its own words."""


class QuintetParser(LightningArgumentParser):
    """Parser that leaves reporting its errors to the caller."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage and exiting.

        Raises:
            RejectedConfig: Always, except within jsonargparse's own trials of alternatives.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        raise RejectedConfig(message) from ex


class QuintetCLI(LightningCLI):
    """LightningCLI in which every run owns a directory and can be resumed exactly.

    Args:
        invocation: The command line, already read.
        requests: Remembers SIGINT and SIGTERM.
        **lightning: Arguments of LightningCLI.
    """

    def __init__(self, invocation: Invocation, requests: StopRequests, **lightning: Any) -> None:  # noqa: ANN401
        self.invocation = invocation
        self.requests = requests
        self.run: RunDirectory
        self._config_text = ""
        self._resolved: dict[str, Any] = {}
        exact = {"allow_abbrev": False}  # an abbreviated flag is a misspelt one
        super().__init__(parser_class=QuintetParser, parser_kwargs=exact, **lightning)

    @property
    def section(self) -> Namespace:
        """The configuration of the subcommand."""
        section: Namespace = self.config[self.invocation.subcommand]
        return section

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed, which is a number in every run: all randomness is keyed by it."""
        default = self.seed_everything_default
        parser.add_argument("--seed_everything", type=int, default=default, help="Seed of the run.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's own settings and the links between data and model."""
        parser.add_argument(
            "--name", type=str | None, help="Name of the run; the config's by default."
        )
        parser.add_argument("--runs_dir", type=str, default="runs", help="Parent of all runs.")
        parser.add_argument("--resume", type=str | None, help="Run directory to go on with.")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        for component in ("model", "data"):
            parser.link_arguments("seed_everything", f"{component}.init_args.seed")
        for name in LINKED_TO_DATA:
            parser.link_arguments(
                "data", f"model.init_args.{name}", self._taker(name), apply_on="instantiate"
            )

    def _taker(self, name: str) -> Callable[[LightningDataModule], Any]:
        """Return what computes an argument of the model from the data module.

        A link to the attribute itself would print a data module that lacks it, and Lightning
        prints one by reading all its data.
        """

        def take(data: LightningDataModule) -> Any:  # noqa: ANN401 - the argument's own type
            return getattr(data, name, self.section.model.init_args.get(name))

        return take

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401
        """Parse what the invocation holds.

        Raises:
            ConfigError: If a setting is wrong.
        """
        settings, subcommand = self.invocation.settings, self.invocation.subcommand
        try:
            self.config = parser.parse_args(self.invocation.arguments)
        except RejectedConfig as rejected:
            sub_parser = self._subcommand_parsers[subcommand]
            raise explain(str(rejected), sub_parser, settings) from None
        if self.section.weights_only is False:
            problem = "must stay true: loading anything but tensors and plain values can run code"
            raise ConfigError(find_place(settings, "weights_only"), "weights_only", problem)
        self.section.weights_only = True
        if subcommand in ("validate", "test"):
            self.section.verbose = False  # RunSummary prints the table
        elif subcommand == "predict" and self.section.return_predictions is None:
            self.section.return_predictions = False

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: files and flags decide it, never a checkpoint.

        Lightning would merge the checkpoint's hyper-parameters over the configuration here, and
        import the class that it names.
        """

    def instantiate_classes(self) -> None:
        """Open the run directory, then build data module, model and trainer.

        Raises:
            ConfigError: If a constructor rejects its arguments.
            CheckpointError: If the checkpoint cannot be used with this model.
        """
        section, call = self.section, self.invocation
        method = _method_of(section.model.class_path)
        self.run = choose_run(
            call,
            runs_dir=Path(section.runs_dir),
            method=method,
            name=section.name or call.config_stem or method,
            ckpt_path=section.ckpt_path,
        )
        try:
            self.run.check_writable()
            section.ckpt_path = choose_checkpoint(self.run, section.ckpt_path, call.subcommand)
            self._config_text = self._dump(skip_link_targets=True)
            self._resolved = yaml.safe_load(self._dump(skip_link_targets=False))
            place_loggers(section.trainer, self.run)
            super().instantiate_classes()
            if section.ckpt_path is not None and "://" not in section.ckpt_path:
                check_fit(section.ckpt_path, self.model)
        except Exception as error:
            self.run.discard()
            explained = explain_construction(
                error, self._subcommand_parsers[call.subcommand], call.settings
            )
            if explained is None:
                raise
            raise explained from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ANN401
        """Build the trainer with what every run has, unless the configuration brings its own."""
        check_links(self.invocation.settings, self.datamodule, self.model)
        self._resolved["model"]["init_args"] |= linked_values(self.datamodule, self.model)
        given: Namespace = self._get(self.config_init, "trainer")
        settings: dict[str, Any] = {**given.as_dict(), **kwargs}
        settings["default_root_dir"] = str(self.run.path)
        plugins = _as_list(settings["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            settings["plugins"] = [*plugins, VerifiedCheckpointIO()]
        if settings["barebones"]:
            return self._instantiate_trainer(settings, [])
        if settings["logger"] is not False:
            loggers = [item for item in _as_list(settings["logger"]) if isinstance(item, Logger)]
            leave_out_unset(loggers)
            settings["logger"] = [RunCSVLogger(self.run.path), *loggers]
        settings["callbacks"] = _as_list(settings["callbacks"])
        own = self._own_callbacks(settings)
        kept = [type(callback) for callback in settings["callbacks"]]
        return self._instantiate_trainer(settings, [cb for cb in own if type(cb) not in kept])

    def _own_callbacks(self, settings: dict[str, Any]) -> list[Callback]:
        given: list[Callback] = settings["callbacks"]
        own: list[Callback] = []
        if settings["enable_progress_bar"] is not False and not _has(given, ProgressBar):
            own.append(TrainingBar())
        if settings["enable_model_summary"] is not False and not _has(given, ModelSummary):
            own.append(ParameterSummary())
        own += [
            StepSeed(self.section.seed_everything),
            FiniteLoss(),
            RunRecord(self.run, Path(self.section.runs_dir), self._config_text, self._resolved),
            RunSummary(),
        ]
        if settings["enable_checkpointing"] is not False:
            checkpoint = next((cb for cb in given if isinstance(cb, RunCheckpoint)), None)
            checkpoint = checkpoint or self._get(self.config_init, "checkpoint")
            own += [checkpoint, GracefulStop(checkpoint, self.requests)]
        return own

    def _run_subcommand(self, subcommand: str) -> None:
        """Run, and say how to go on if a signal or the loss of another process stops it."""
        with reported_loss(self.trainer, self.run, subcommand):
            self._run_stoppable(subcommand)

    def _run_stoppable(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
            if self.requests.requested:
                raise StopRequested(self.requests.requested)
        except StopRequested:
            if subcommand == "fit" and is_zero_rank():
                print(f"stopped; resume with: python train.py fit --resume {self.run.path}")
            raise
        except Exception:
            if subcommand == "fit" and self.trainer.global_step == 0:
                self.run.discard()
            raise
        finally:
            if is_trial(self.trainer):
                self.run.discard()
            for logger in self.trainer.loggers:
                if isinstance(logger, WandbLogger) and is_zero_rank():
                    logger.experiment.finish()

    def _dump(self, *, skip_link_targets: bool) -> str:
        """Return the configuration as YAML that ``--config`` takes, without this call's own."""
        parser = self._subcommand_parsers[self.invocation.subcommand]
        text = parser.dump(self.section, skip_none=False, skip_link_targets=skip_link_targets)
        content: dict[str, Any] = yaml.safe_load(text)
        for key in _CALL_ONLY:
            content.pop(key, None)
        content["trainer"].pop("default_root_dir", None)
        return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _method_of(class_path: str) -> str:
    """Return the folder of a model's runs: ``farmer`` for ``lightning_modules.farmer.Farmer``."""
    parts = class_path.split(".")
    return parts[-2] if len(parts) > 1 else parts[0].lower()


def _as_list(value: Any) -> list[Any]:  # noqa: ANN401 - a setting that may be one or many
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _has(callbacks: list[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
