"""Finds the class behind a class path, or says which name in it is wrong."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from difflib import get_close_matches
from types import ModuleType

from lightning_modules.cli.errors import ConfigError


def find_class(path: str, bases: list[type], place: str, key: str) -> type:
    """Import a class.

    Args:
        path: Dotted path, or the bare name of a subclass of one of ``bases`` imported already.
        bases: The class must be a subclass of one of these.
        place: Where the setting was made, for the error.
        key: Key of the setting, for the error.

    Raises:
        ConfigError: If there is no such module or class, or the class is of another kind.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        found = _subclass_names(bases).get(name)
        if found is None:
            close = get_close_matches(name, _subclass_names(bases), n=1)
            hint = f"did you mean '{close[0]}'?" if close else "expected module.ClassName"
            raise ConfigError(place, key, f"no class '{name}'; {hint}")
        return found
    found = getattr(_import_module(module_name, place, key), name, None)
    if not inspect.isclass(found):
        module = importlib.import_module(module_name)
        raise ConfigError(
            place, key, f"no class '{name}' in {module_name}{_near_class(module, name)}"
        )
    if bases and not issubclass(found, tuple(bases)):
        wanted = " or ".join(base.__name__ for base in bases)
        raise ConfigError(place, key, f"{path} is not a {wanted}")
    return found


def _import_module(name: str, place: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if not name.startswith(missing):
            problem = f"{name} needs the package '{missing}', which is not installed"
            raise ConfigError(place, key, problem) from None
        raise ConfigError(place, key, f"no module '{missing}'{_near_module(missing)}") from None
    except Exception as error:
        problem = f"{name} cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError(place, key, " ".join(problem.split())) from None


def _near_module(name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    if parent:
        paths = getattr(importlib.import_module(parent), "__path__", None)
        names = [module.name for module in pkgutil.iter_modules(paths)]
    else:
        names = ["lightning_modules", "datamodules", "models", "lightning", "torch"]
    close = get_close_matches(leaf, names, n=1)
    full = f"{parent}.{close[0]}".lstrip(".") if close else ""
    return f"; did you mean '{full}'?" if close else ""


def _near_class(module: ModuleType, name: str) -> str:
    names = [n for n, member in vars(module).items() if inspect.isclass(member) and n[0] != "_"]
    close = get_close_matches(name, names, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _subclass_names(bases: list[type]) -> dict[str, type]:
    """Return the subclasses imported so far by name."""
    found: dict[str, type] = {}
    queue = list(bases)
    while queue:
        current = queue.pop()
        found.setdefault(current.__name__, current)
        queue += current.__subclasses__()
    return found
