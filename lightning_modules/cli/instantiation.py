"""What a constructor complains about, told with the place of the setting."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from lightning_modules.cli.diagnosis import find_wrong_setting
from lightning_modules.cli.errors import ConfigError, ReportedError
from lightning_modules.cli.failures import one_line
from lightning_modules.cli.settings import Setting, find_keys, find_place

_KEY_AT_END = re.compile(r"\s*\(((?:model|data|trainer|checkpoint)(?:\.\w+)+)\)$")
_ARGUMENT = re.compile(r"\b(\w+)=['\"]?([^\s,:;'\")]*)")
# How jsonargparse reports what went wrong below it: in a class, and in a link from the data.
_WRAPPINGS = ("Does not validate against any of the Union subtypes", "Call to compute_fn of link ")


def explain_construction(
    error: Exception, parser: ArgumentParser, settings: Sequence[Setting]
) -> Exception | None:
    """Turn the failure of a constructor into a configuration error.

    Args:
        error: As it came out of ``instantiate_classes``.
        parser: Parser of the subcommand.
        settings: Files and flags in the order in which they take effect.

    Returns:
        The error to raise instead, or None if this one is reported already. Errors that no wrong
        setting explains, such as an AttributeError, are returned as they were raised.
    """
    if isinstance(error, ReportedError):
        return None
    root = _root_cause(error)
    is_misconfiguration = type(root).__name__ == "MisconfigurationException"
    if not is_misconfiguration and not isinstance(root, (ValueError, OSError, ImportError)):
        # jsonargparse lets null through for any type, which a constructor may stumble over.
        suspect = find_wrong_setting(parser, settings) if isinstance(root, TypeError) else None
        return suspect or (root if root is not error else None)
    message = one_line(str(root))
    key = _key_of(message, settings)
    return ConfigError(find_place(settings, key), *_once(key, _KEY_AT_END.sub("", message)))


def _once(key: str, message: str) -> tuple[str, str]:
    """Key and problem, without the argument's name at the head of the message.

    Where that is followed by a value, the value goes to the key: ``model.init_args.width=0``.
    """
    named, _, problem = message.partition(": ")
    name, equals, value = named.partition("=")
    if key and f".{key}".endswith(f".{name}"):
        return key + equals + value, problem
    return key, message


def _root_cause(error: Exception) -> Exception:
    """Undo jsonargparse's wrapping: it tries each member of a Union and reports all failures."""
    current = error
    while any(words in str(current) for words in _WRAPPINGS):
        if not isinstance(current.__cause__, Exception):
            break
        current = current.__cause__
    return current


def _key_of(message: str, settings: Sequence[Setting]) -> str:
    """Return the key that a message is about: named at its end, or an argument it quotes."""
    named = _KEY_AT_END.search(message)
    if named:
        return named.group(1)
    for name, value in _ARGUMENT.findall(message):
        keys = find_keys(settings, name)
        quoted = [key for key, setting in keys.items() if str(setting.value) == value]
        for candidates in (quoted, list(keys)):
            if len(candidates) == 1:
                return candidates[0]
    return ""
