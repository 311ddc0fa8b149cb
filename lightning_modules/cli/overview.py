"""The first screen, answered before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from lightning_modules.cli.errors import COMMAND_LINE, ConfigError

SUBCOMMANDS = ("fit", "validate", "test", "predict")

OVERVIEW = """\
Quintet: five methods for images, each a model, a data module and a YAML file, one train.py.

  python train.py SUBCOMMAND --config FILE.yaml [--config MORE.yaml ...] [--KEY VALUE ...]

Subcommands
  fit        train; the run gets a directory runs/METHOD/NAME-TIME/ of its own
  validate   compute the validation metrics of a checkpoint
  test       compute the test metrics of a checkpoint and draw samples
  predict    write samples to files

Where to start
  python train.py fit --config configs/farmer/demo.yaml      trains in minutes on two CPU cores
  python train.py test --resume runs/latest                  metrics and a grid of samples
  python train.py fit --resume RUN_DIR                       continues a stopped run exactly

Later files and flags win:  --config configs/trainer/ddp.yaml --config configs/logger/wandb.yaml
                            --trainer.max_steps 1000 --model.lr 3e-4 --data.batch_size 64
Run directory               --name NAME, --runs_dir DIR, --resume RUN_DIR
Everything that can be set  python train.py fit --help
The settings in effect      python train.py fit --config FILE.yaml --print_config
"""


def is_overview_request(argv: Sequence[str]) -> bool:
    """Say whether the command line asks for the first screen: nothing given, or help alone."""
    return not argv or argv[0] in ("-h", "--help", "help")


def check_subcommand(argv: Sequence[str]) -> str:
    """Return the subcommand.

    Raises:
        ConfigError: If the first argument is none of the subcommands.
    """
    word = argv[0]
    if word in SUBCOMMANDS:
        return word
    names = ", ".join(SUBCOMMANDS)
    if word.startswith("-"):
        raise ConfigError(COMMAND_LINE, word, f"the subcommand comes first; one of {names}")
    close = get_close_matches(word, SUBCOMMANDS, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"expected one of {names}"
    raise ConfigError(COMMAND_LINE, word, f"unknown subcommand; {hint}")
