"""Where each setting was made: YAML files read with line numbers, and command-line flags.

Pure PyYAML, so that a misspelt path or broken syntax is answered before torch is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_modules.cli.errors import COMMAND_LINE, ConfigError

_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class Setting(NamedTuple):
    """A value and the place that set it.

    Attributes:
        value: A scalar, a list of settings or a dict from key to setting.
        place: ``file:line`` or ``command line``.
    """

    value: Any
    place: str


def read_settings(arguments: Sequence[str]) -> list[Setting]:
    """Read every ``--config`` file and flag, in the order in which they take effect.

    Args:
        arguments: What follows the subcommand.

    Returns:
        One tree per file or flag; the value of each is a dict.

    Raises:
        ConfigError: If a file is missing, empty, not a mapping, not YAML or repeats a key.
    """
    trees = []
    for flag, value in iterate_flags(arguments):
        if flag in ("config", "c"):
            if value is None:
                raise ConfigError(COMMAND_LINE, "--config", "expected the path of a YAML file")
            trees.append(read_yaml(Path(value)))
        else:
            trees.append(_flag_tree(flag, value))
    return trees


def iterate_flags(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (name without dashes, text of the value or None) for each flag."""
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        if not word.startswith("-"):
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if equals:
            yield name, value
        elif position < len(arguments) and not _is_flag(arguments[position]):
            yield name, arguments[position]
            position += 1
        else:
            yield name, None


def read_yaml(path: Path) -> Setting:
    """Read one YAML file with the line of every value.

    Raises:
        ConfigError: If the file is missing, empty, not a mapping, not YAML or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(str(path), "", f"no such file{_near_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), "", f"cannot be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = " ".join(str(error.problem).split())
        hint = "; indent with spaces, not tabs" if "\\t" in problem else ""
        raise ConfigError(place, "", f"not valid YAML: {problem}{hint}") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            str(path), "", f"not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if node is None:
        raise ConfigError(
            str(path), "", "the file is empty; expected keys such as model: and data:"
        )
    if not isinstance(node, yaml.MappingNode):
        found = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise ConfigError(f"{path}:1", "", f"expected keys such as model: and data:, found {found}")
    return _locate(node, path, prefix="")


def find_place(trees: Sequence[Setting], key: str) -> str:
    """Return where ``key`` was last set, or where its nearest enclosing section was.

    Args:
        trees: What :func:`read_settings` returned.
        key: Full dotted key; ``model.lr`` stands for ``model.init_args.lr`` too.
    """
    best_depth, best_place = 0, COMMAND_LINE
    for tree in trees:
        depth, place = _descend(tree, [part for part in key.split(".") if part != "init_args"])
        if depth >= best_depth and depth > 0:
            best_depth, best_place = depth, place
    return best_place


def explicit_value(trees: Sequence[Setting], key: str) -> Setting | None:
    """Return the setting of ``key`` that takes effect, or None if nobody made it."""
    parts = [part for part in key.split(".") if part != "init_args"]
    found = None
    for tree in trees:
        node: Setting | None = tree
        for part in parts:
            node = _child(node, part) if node is not None else None
        found = node or found
    return found


def find_keys(trees: Sequence[Setting], name: str) -> dict[str, Setting]:
    """Return the settings whose own name is ``name``, by full key; later ones replace earlier."""
    found: dict[str, Setting] = {}
    for tree in trees:
        for key, setting in _leaves(tree, ""):
            if key.rpartition(".")[2] == name:
                found[key] = setting
    return found


def _leaves(node: Setting, prefix: str) -> Iterator[tuple[str, Setting]]:
    """Yield every setting below ``node``; ``model.lr`` appears as ``model.init_args.lr``."""
    for name, child in node.value.items() if isinstance(node.value, dict) else ():
        is_short = prefix in ("model", "data") and name not in _CLASS_KEYS
        key = f"{prefix}.init_args.{name}" if is_short else f"{prefix}.{name}".lstrip(".")
        yield key, child
        yield from _leaves(child, key)


def _descend(tree: Setting, parts: list[str]) -> tuple[int, str]:
    node, depth = tree, 0
    for part in parts:
        child = _child(node, part)
        if child is None:
            break
        node, depth = child, depth + 1
    return depth, node.place


def _child(node: Setting, part: str) -> Setting | None:
    if not isinstance(node.value, dict):
        return None
    inner = node.value.get("init_args")
    if isinstance(inner, Setting) and isinstance(inner.value, dict) and part in inner.value:
        return Setting(*inner.value[part])
    child = node.value.get(part)
    return Setting(*child) if child is not None else None


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-[\d.].*", word)


def _flag_tree(flag: str, text: str | None) -> Setting:
    try:
        value = _plain(yaml.safe_load(text)) if text is not None else None
    except yaml.YAMLError:
        value = text
    node = Setting(_with_place(value), COMMAND_LINE)
    for part in reversed(flag.rstrip("+").split(".")):
        node = Setting({part: node}, COMMAND_LINE)
    return node


def _with_place(value: object) -> object:
    if isinstance(value, dict):
        return {str(k): Setting(_with_place(v), COMMAND_LINE) for k, v in value.items()}
    if isinstance(value, list):
        return [Setting(_with_place(item), COMMAND_LINE) for item in value]
    return value


def _plain(value: object) -> object:
    """Read ``1e-3`` as a number, which YAML 1.1 does not but every user means."""
    if isinstance(value, str) and _FLOAT.fullmatch(value):
        return float(value)
    return value


def _locate(node: yaml.Node, path: Path, prefix: str) -> Setting:
    place = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        items = [_locate(item, path, f"{prefix}[{i}]") for i, item in enumerate(node.value)]
        return Setting(items, place)
    if not isinstance(node, yaml.MappingNode):
        constructor = yaml.SafeLoader("")
        try:
            return Setting(_plain(constructor.construct_object(node, deep=True)), place)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(place, prefix, f"not valid YAML: {error}") from None
    _refuse_duplicates(node, path, prefix)
    yaml.SafeLoader("").flatten_mapping(node)  # resolves `<<: *anchor`
    entries = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        child = _locate(value_node, path, f"{prefix}.{key}".lstrip("."))
        entries[key] = Setting(child.value, f"{path}:{key_node.start_mark.line + 1}")
    return Setting(entries, place)


def _refuse_duplicates(node: yaml.MappingNode, path: Path, prefix: str) -> None:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen:
            full = f"{prefix}.{key}".lstrip(".")
            raise ConfigError(f"{path}:{line}", full, f"given twice, first on line {seen[key]}")
        seen[key] = line


def _near_files(path: Path) -> str:
    from difflib import get_close_matches

    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    names = [entry.name for entry in path.parent.iterdir()]
    close = get_close_matches(path.name, names, n=1)
    return f"; did you mean '{path.parent / close[0]}'?" if close else ""
