"""Finds the setting behind a rejected configuration and says what was expected there.

jsonargparse reports a wrong setting as a page of type alternatives. The functions here walk the
user's files and flags along the signatures of the classes they name, and stop at the first
setting that does not fit.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser

from lightning_modules.cli.class_paths import find_class
from lightning_modules.cli.errors import COMMAND_LINE, ConfigError
from lightning_modules.cli.settings import Setting, find_place

_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
_MOST_NAMES = 8


def explain(message: str, parser: ArgumentParser, settings: Sequence[Setting]) -> ConfigError:
    """Turn a rejection by jsonargparse into an error with place, key and expectation.

    Args:
        message: What jsonargparse said, used if nothing more precise is found.
        parser: Parser of the subcommand.
        settings: Files and flags in the order in which they take effect.
    """
    return find_wrong_setting(parser, settings) or _condense(message, settings)


def find_wrong_setting(parser: ArgumentParser, settings: Sequence[Setting]) -> ConfigError | None:
    """Return the first setting that does not fit the signature it is for, or None."""
    walk = _Walk()
    try:
        for tree in settings:
            walk.check_section(parser, tree.value, prefix="")
        walk.check_missing()
    except ConfigError as error:
        return error
    return None


class _Walk:
    """One pass over all settings, remembering which class each component has got so far."""

    def __init__(self) -> None:
        self.classes: dict[str, tuple[type, str]] = {}
        self.given: dict[str, set[str]] = {}

    def check_section(
        self, parser: ArgumentParser, section: Mapping[str, Setting], prefix: str, group: str = ""
    ) -> None:
        """Check one level of settings.

        Args:
            parser: Knows the names and types of this level.
            section: Settings by name.
            prefix: Key of this level within the whole configuration, with a dot at its end.
            group: Key of this level within ``parser``, with a dot at its end.
        """
        annotations = _annotations(parser)
        for name, setting in section.items():
            key = group + name
            self.given.setdefault(prefix, set()).add(name)
            nested = any(known.startswith(f"{key}.") for known in annotations)
            if nested and isinstance(setting.value, dict):
                self.check_section(parser, setting.value, f"{prefix}{name}.", f"{key}.")
            elif key in annotations:
                self.check_value(annotations[key], setting, prefix + name)
            elif not nested:
                known = [k[len(group) :].split(".")[0] for k in annotations if k.startswith(group)]
                raise ConfigError(setting.place, prefix + name, _unknown(name, known))

    def check_value(self, annotation: Any, setting: Setting, key: str) -> None:  # noqa: ANN401
        """Check one value against a type annotation (any, as jsonargparse understands it)."""
        bases, item_type = _component_types(annotation)
        value = setting.value
        if isinstance(value, list) and item_type is not None:
            for number, item in enumerate(value):
                self.check_value(item_type, item, f"{key}[{number}]")
        elif bases and self._names_component(annotation, value, key):
            self.check_component(bases, setting, key)
        elif annotation is not None:
            plain = _strip_places(value)
            if not _accepts(annotation, plain):
                expected = _describe_type(annotation)
                raise ConfigError(setting.place, key, f"expected {expected}, got {plain!r}")

    def check_component(self, bases: list[type], setting: Setting, key: str) -> None:
        """Check a class path and the arguments given for that class."""
        value = setting.value
        if isinstance(value, str):
            self.classes[key] = (find_class(value, bases, setting.place, key), setting.place)
            return
        on_command_line = setting.place == COMMAND_LINE
        for name, entry in value.items():
            if name not in _CLASS_KEYS and not on_command_line:
                problem = _unknown(name, _CLASS_KEYS) + "; arguments belong under init_args"
                raise ConfigError(entry.place, f"{key}.{name}", problem)
        if "class_path" in value:
            path, place = value["class_path"]
            if not isinstance(path, str):
                raise ConfigError(place, f"{key}.class_path", f"expected a class, got {path!r}")
            self.classes[key] = (find_class(path, bases, place, f"{key}.class_path"), place)
        arguments = {name: entry for name, entry in value.items() if name not in _CLASS_KEYS}
        if "init_args" in value and isinstance(value["init_args"].value, dict):
            arguments |= value["init_args"].value
        if not arguments:
            return
        if key not in self.classes:
            raise ConfigError(setting.place, f"{key}.class_path", "missing; which class is it?")
        self.check_section(_class_parser(self.classes[key][0]), arguments, f"{key}.init_args.")

    def check_missing(self) -> None:
        """Check that every required setting was made."""
        for name in ("model", "data"):
            if name not in self.given.get("", set()):
                raise ConfigError(
                    COMMAND_LINE, name, f"missing; give --config FILE or --{name} CLASS"
                )
        for key, (component, place) in self.classes.items():
            given = self.given.get(f"{key}.init_args.", set())
            component_parser = _class_parser(component)
            required = {action.dest for action in component_parser._actions if action.required}
            for name in sorted(required - given):
                expected = _describe_type(_annotations(component_parser).get(name))
                problem = f"missing; {component.__name__} needs it ({expected})"
                raise ConfigError(place, f"{key}.init_args.{name}", problem)

    def _names_component(self, annotation: Any, value: object, key: str) -> bool:  # noqa: ANN401
        if isinstance(value, dict):
            return True
        return isinstance(value, str) and str not in get_args(annotation)


def _class_parser(component: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(component, fail_untyped=False, sub_configs=True)
    return parser


def _annotations(parser: ArgumentParser) -> dict[str, Any]:
    """Return the type of each argument by its dotted name; None where it is not known."""
    skipped = ("help", "print_config", "==SUPPRESS==")
    return {
        action.dest: getattr(action, "_typehint", None) or getattr(action, "type", None)
        for action in parser._actions
        if action.dest not in skipped and not type(action).__name__.startswith("_ActionHelp")
    }


def _component_types(annotation: Any) -> tuple[list[type], Any]:  # noqa: ANN401
    """Split an annotation into the classes it allows and the item type of its list, if any."""
    if inspect.isclass(annotation) and get_origin(annotation) is None:
        module = annotation.__module__
        is_plain = module in ("builtins", "pathlib", "datetime") or module.startswith(
            "jsonargparse"
        )
        return ([] if is_plain else [annotation]), None
    bases: list[type] = []
    item_type = None
    origin_name = getattr(get_origin(annotation), "__name__", "")
    if origin_name in ("list", "Iterable", "Sequence"):
        return [], get_args(annotation)[0] if get_args(annotation) else None
    if origin_name in ("Union", "UnionType", "Optional"):
        for part in get_args(annotation):
            part_bases, part_item = _component_types(part)
            bases += part_bases
            item_type = part_item or item_type
    return bases, item_type


def _accepts(annotation: Any, value: object) -> bool:  # noqa: ANN401
    if value is None:  # jsonargparse itself takes null for "not set", whatever the type
        return annotation is Any or annotation is type(None) or type(None) in get_args(annotation)
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=annotation)
        parser.parse_object({"value": value})
    except ArgumentError:
        return False
    except Exception:
        return True  # an annotation that jsonargparse cannot judge on its own
    return True


def _describe_type(annotation: Any) -> str:  # noqa: ANN401
    origin_name = getattr(get_origin(annotation), "__name__", "")
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if annotation is None or annotation is Any:
        return "a value"
    if origin_name == "Literal":
        return "one of " + ", ".join(map(str, parts))
    if origin_name in ("Union", "UnionType", "Optional"):
        names = " or ".join(dict.fromkeys(_describe_type(part) for part in parts))
        return f"{names} or null" if len(parts) < len(get_args(annotation)) else names
    if parts and origin_name:
        items = ", ".join("..." if part is Ellipsis else _describe_type(part) for part in parts)
        return f"{origin_name}[{items}]"
    return str(getattr(annotation, "__name__", annotation))


def _unknown(name: str, known: Sequence[str]) -> str:
    names = sorted(set(known))
    close = get_close_matches(name, names, n=1, cutoff=0.55)
    if close:
        return f"unknown key; did you mean '{close[0]}'?"
    shown = ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
    return (
        f"unknown key; expected one of {shown}" if names else "unknown key; none is accepted here"
    )


def _strip_places(value: object) -> Any:  # noqa: ANN401 - plain YAML content
    if isinstance(value, Setting):
        return _strip_places(value.value)
    if isinstance(value, dict):
        return {name: _strip_places(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_strip_places(entry) for entry in value]
    return value


def _condense(message: str, settings: Sequence[Setting]) -> ConfigError:
    """Reduce jsonargparse's own message to its key and its last statement that says something."""
    key = message.partition('Parser key "')[2].partition('"')[0]
    lines = [line.strip(" -") for line in message.splitlines()]
    noise = ("Expected a <class 'NoneType'>", "Given value", "Subtypes:", "Errors:", "Parser key")
    telling = [line for line in lines if line and not line.startswith(noise)]
    problem = telling[-1] if telling else " ".join(message.split())
    return ConfigError(find_place(settings, key) if key else COMMAND_LINE, key, problem)
