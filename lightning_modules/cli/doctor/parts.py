"""The classes of a configuration, built one by one as ``fit`` builds them, and left unused."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser

from lightning_modules.cli.errors import ReportedError
from lightning_modules.cli.failures import one_line
from lightning_modules.cli.instantiation import explain_construction
from lightning_modules.cli.interface import LIGHTNING_OPTIONS, QuintetCLI
from lightning_modules.cli.invocation import Invocation
from lightning_modules.cli.linked_values import LINKED_TO_DATA, check_links
from lightning_modules.cli.signals import StopRequests

# What a trainer in this process, without a device and without a network, cannot have.
_NEUTRAL: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": None,
    "plugins": None,
    "sync_batchnorm": False,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "profiler": None,
}


class UnbuiltPart(Exception):
    """A class that its settings do not let be built; the message is one line."""


class _ParsedCLI(QuintetCLI):
    """Reads and checks a configuration as ``fit`` does; builds and runs nothing."""

    def instantiate_classes(self) -> None:
        """Leave the building to `ConfiguredParts`."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing."""


class ConfiguredParts:
    """A configuration and what can be built of it.

    Args:
        invocation: The command line, as one of ``fit``.

    Raises:
        ConfigError: If a setting is wrong.
    """

    def __init__(self, invocation: Invocation) -> None:
        self._invocation = invocation
        self._cli = _ParsedCLI(invocation, StopRequests(), **LIGHTNING_OPTIONS)
        self.section = self._cli.section

    def build_data(self) -> LightningDataModule:
        """Build the data module.

        Raises:
            UnbuiltPart: If it cannot be built.
        """
        data: LightningDataModule = self._build(LightningDataModule, "data", self.section.data)
        return data

    def build_model(self, data: LightningDataModule | None, device: str) -> LightningModule:
        """Build the model with all its layers.

        Args:
            data: Gives the linked arguments; None leaves what the configuration itself has.
            device: ``meta`` allocates nothing.

        Raises:
            UnbuiltPart: If it cannot be built.
            NotImplementedError: If it computes something of its weights, on ``meta``.
        """
        settings = self.section.model.clone()
        self._link(settings, data)
        with warnings.catch_warnings(), torch.device(device):
            if device == "meta":  # values that are read from files have nowhere to go
                warnings.simplefilter("ignore")
            model: LightningModule = self._build(LightningModule, "model", settings)
            if data is not None:
                self._explained(lambda: check_links(self._invocation.settings, data, model))
            self._explained(model.configure_model)
        return model

    def build_trainer(self, folder: Path) -> Trainer:
        """Build the trainer with the configured callbacks, for one process on the CPU.

        Raises:
            UnbuiltPart: If it, or a callback, cannot be built.
        """
        settings = self.section.trainer.clone()
        for name, value in _NEUTRAL.items():
            settings[name] = value
        settings.default_root_dir = str(folder)
        built = self._build(Trainer, "trainer", settings)
        trainer: Trainer = self._explained(lambda: Trainer(**built.as_dict()))
        return trainer

    def own_callbacks(self, trainer: Trainer) -> list[Callback]:
        """The callbacks that the configuration names, of those that a trainer has."""
        named = self.section.trainer.callbacks or []
        paths = [str(one.class_path) for one in (named if isinstance(named, list) else [named])]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return [
            callback
            for callback in callbacks
            if any(path.endswith(f".{type(callback).__name__}") for path in paths)
        ]

    def _build(self, kind: type, key: str, settings: Namespace) -> Any:  # noqa: ANN401
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_lightning_class_args(kind, key, subclass_mode=kind is not Trainer)
        wanted = Namespace({key: settings})  # type: ignore[no-untyped-call]
        built = self._explained(lambda: parser.instantiate_classes(wanted))
        return built[key]

    def _explained(self, act: Any) -> Any:  # noqa: ANN401 - any call without arguments
        """Do something and tell what goes wrong as ``fit`` would.

        Raises:
            UnbuiltPart: If it goes wrong.
        """
        try:
            return act()
        except NotImplementedError:
            raise
        except ReportedError as error:
            raise UnbuiltPart(one_line(str(error))) from None
        except Exception as error:
            parser = self._cli._subcommand_parsers[self._invocation.subcommand]
            explained = explain_construction(error, parser, self._invocation.settings) or error
            if isinstance(explained, NotImplementedError):
                raise explained from None
            kind = (
                ""
                if isinstance(explained, (ReportedError, ValueError, OSError))
                else (f"{type(explained).__name__}: ")
            )
            raise UnbuiltPart(kind + one_line(str(explained))) from error

    def _link(self, settings: Namespace, data: LightningDataModule | None) -> None:
        """Give the model what it takes from the data module."""
        class_path = str(settings.class_path)
        module, _, name = class_path.rpartition(".")
        kind = getattr(__import__(module, fromlist=[name]), name)
        accepted = inspect.signature(kind.__init__).parameters
        source: Any = data if data is not None else self.section.data.init_args
        for linked in LINKED_TO_DATA:
            value = self._explained(lambda name=linked: getattr(source, name, None))
            if linked in accepted and value is not None:
                settings.init_args[linked] = value
