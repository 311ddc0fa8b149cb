"""The first screen, answered before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from lightning_modules.cli.errors import COMMAND_LINE, ConfigError

SUBCOMMANDS = ("fit", "validate", "test", "predict")
EXAMINATION = "doctor"
_ROOT = Path(__file__).resolve().parents[2]

_OVERVIEW = """\
Quintet: methods for images, each a model, a data module and a YAML file, all by one train.py.

  python train.py SUBCOMMAND --config FILE.yaml [--config MORE.yaml ...] [--KEY VALUE ...]

Methods (configs/METHOD/, models/METHOD/README.md; try one: make demo METHOD=farmer, or all)
{methods}
Subcommands
  fit        train; the run gets a directory runs/METHOD/NAME-TIME/ of its own
  validate   compute the validation metrics of a checkpoint
  test       compute the test metrics of a checkpoint, its tables and pictures
  predict    write samples, renders or features to files
  doctor     say before a long fit what is missing for it: versions, data, weights, disk, memory
Where to start
  python train.py fit --config configs/farmer/demo.yaml      trains in minutes on two CPU cores
  python train.py test --resume runs/latest                  metrics and a grid of samples
  python train.py fit --resume RUN_DIR                       continues a stopped run exactly
  python train.py doctor --config FILE.yaml                  everything there for your own run?

Later files and flags win:  --config configs/trainer/ddp.yaml --config configs/logger/wandb.yaml
                            --trainer.max_steps 1000 --model.lr 3e-4 --data.batch_size 64
Run directory               --name NAME, --runs_dir DIR, --resume RUN_DIR
Everything that can be set  python train.py fit --help
The settings in effect      python train.py fit --config FILE.yaml --print_config
"""


def overview() -> str:
    """The first screen, with a line for every method that has configurations and a model."""
    methods = describe_methods(_ROOT)
    width = max(map(len, methods), default=0)
    lines = [f"  {name:<{width}}  {text}" for name, text in methods.items()]
    return _OVERVIEW.format(methods="\n".join(lines))


def describe_methods(root: Path) -> dict[str, str]:
    """Each method's folder and the sentence at the head of its package, read without importing.

    Args:
        root: Has ``configs`` and ``models``.
    """
    methods = {}
    for folder in sorted((root / "configs").iterdir()):
        package = root / "models" / folder.name / "__init__.py"
        if package.is_file():
            methods[folder.name] = package.read_text(encoding="utf-8").split('"""')[1].strip()
    return methods


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
    known = (*SUBCOMMANDS, EXAMINATION)
    names = ", ".join(known)
    if word.startswith("-"):
        raise ConfigError(COMMAND_LINE, word, f"the subcommand comes first; one of {names}")
    close = get_close_matches(word, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"expected one of {names}"
    raise ConfigError(COMMAND_LINE, word, f"unknown subcommand; {hint}")
