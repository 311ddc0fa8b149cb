"""Values that the model takes from the data module, so that they are written once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_modules.cli.errors import ConfigError
from lightning_modules.cli.settings import Setting, explicit_value

LINKED_TO_DATA = ("image_size", "channels", "levels", "num_classes", "grid_size")


def linked_values(data: LightningDataModule, model: LightningModule) -> dict[str, Any]:
    """Return what the model was given by the data module, by argument name."""
    accepted = inspect.signature(type(model).__init__).parameters
    names = [name for name in LINKED_TO_DATA if name in accepted and hasattr(data, name)]
    return {name: getattr(data, name) for name in names}


def check_links(
    settings: Sequence[Setting], data: LightningDataModule, model: LightningModule
) -> None:
    """Check that nobody has set a linked argument of the model to something else.

    Raises:
        ConfigError: If so; the setting would be ignored in silence otherwise.
    """
    for name, value in linked_values(data, model).items():
        setting = explicit_value(settings, f"model.{name}")
        if setting is not None and setting.value not in (None, value):
            problem = (
                f"{setting.value} differs from the data module's {value}; set data.{name} only"
            )
            raise ConfigError(setting.place, f"model.init_args.{name}", problem)
    seed = explicit_value(settings, "seed_everything")
    for component in ("model", "data"):
        setting = explicit_value(settings, f"{component}.seed")
        if setting is not None and setting.value != (seed.value if seed else 0):
            problem = "set seed_everything instead; every seed follows it"
            raise ConfigError(setting.place, f"{component}.init_args.seed", problem)
