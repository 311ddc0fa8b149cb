"""What the user typed, read and checked before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_modules.cli.errors import COMMAND_LINE, ConfigError
from lightning_modules.cli.overview import check_subcommand
from lightning_modules.cli.settings import Setting, iterate_flags, read_settings


@dataclass(frozen=True)
class Invocation:
    """One call of train.py.

    Attributes:
        subcommand: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: What the parser is to see: the subcommand, the configuration of the resumed run
            if there is one, then what the user typed.
        settings: Every file and flag among the arguments, with the place of each value.
        resume: Directory of the run to go on with, or None.
    """

    subcommand: str
    arguments: list[str]
    settings: list[Setting] = field(default_factory=list)
    resume: Path | None = None

    @property
    def config_stem(self) -> str | None:
        """Name of the first configuration file without folder and suffix, or None."""
        for flag, value in iterate_flags(self.arguments[1:]):
            if flag in ("config", "c") and value is not None:
                return Path(value).stem
        return None


def read_invocation(argv: Sequence[str]) -> Invocation:
    """Read the command line and the files it names.

    Args:
        argv: Arguments without the program's name; not empty.

    Raises:
        ConfigError: If the subcommand is unknown or a file cannot be read.
    """
    subcommand, typed = check_subcommand(argv), list(argv[1:])
    flags = dict(iterate_flags(typed))
    if flags.keys() & {"h", "help"}:
        return Invocation(subcommand, [subcommand, *typed])
    resume = _find_run(flags["resume"]) if "resume" in flags else None
    if resume is not None:
        typed = ["--config", str(resume / "config.yaml"), *typed]
    return Invocation(subcommand, [subcommand, *typed], read_settings(typed), resume)


def _find_run(text: str | None) -> Path:
    if text is None:
        raise ConfigError(COMMAND_LINE, "--resume", "expected a run directory, e.g. runs/latest")
    path = Path(text)
    if path.is_file():
        problem = f"{path} is a file; expected a run directory (or use --ckpt_path {path})"
        raise ConfigError(COMMAND_LINE, "--resume", problem)
    if not path.is_dir():
        raise ConfigError(COMMAND_LINE, "--resume", f"{path} does not exist{_other_runs(path)}")
    if not (path / "config.yaml").is_file():
        problem = f"{path} is not a run directory: it has no config.yaml{_other_runs(path)}"
        raise ConfigError(COMMAND_LINE, "--resume", problem)
    real = path.resolve()
    return Path(os.path.relpath(real)) if real.is_relative_to(Path.cwd()) else real


def _other_runs(path: Path) -> str:
    runs = [file.parent for file in path.parent.glob("*/config.yaml")]
    runs += [file.parent for file in path.parent.glob("*/*/config.yaml")]
    newest = max(runs, key=lambda run: run.stat().st_mtime, default=None)
    return f"; the newest run there is {newest}" if newest else ""
