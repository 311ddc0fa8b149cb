"""What the data modules' checks of their arguments share: one wording, ranges, and roots."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

_HUB_NAME = re.compile(r"\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?")
# What everybody calls the folder of all data; nobody means an owner on the hub by it.
_DATA_FOLDERS = ("data", "dataset", "datasets")
_DATA_FILES = (".parquet", ".tar", ".npz", ".jsonl")

IMAGES_AT_LEAST = {
    "image_size": 1,
    "batch_size": 1,
    "eval_batch_size": 1,
    "num_workers": 0,
    "val_size": 1,
    "cache_decoded_mb": 0,
    "seed": 0,
}
"""Least values of the numbers that data modules of images have in common."""


def refuse(data: object, name: str, expected: str) -> NoReturn:
    """Refuse an argument that a data module was given.

    Raises:
        ValueError: one line with its name, its value, what was expected and where to set it.
    """
    raise ValueError(f"{name}={getattr(data, name)}: {expected} (data.init_args.{name})")


def check_least(data: object, least: Mapping[str, int]) -> None:
    """Make sure that no argument is smaller than the number given for its name.

    Raises:
        ValueError: one line naming the first that is.
    """
    for name, smallest in least.items():
        if getattr(data, name) < smallest:
            refuse(data, name, f"must be >= {smallest}")


def check_shares(data: object, *names: str) -> None:
    """Make sure that arguments are shares of a whole.

    Raises:
        ValueError: one line naming the first that is not in [0, 1].
    """
    for name in names:
        if not 0 <= getattr(data, name) <= 1:
            refuse(data, name, "must be 0 .. 1")


def check_predict_count(data: object, otherwise: str = "") -> None:
    """Make sure that ``predict_count`` is null or at least 1.

    Args:
        data: Has the attribute.
        otherwise: What null stands for.

    Raises:
        ValueError: one line naming it.
    """
    count = getattr(data, "predict_count", None)
    if count is not None and count < 1:
        remedy = f", or null for {otherwise}" if otherwise else ""
        refuse(data, "predict_count", f"must be >= 1{remedy}")


def check_root(root: Path | None, layout: str, looked_for: str, embedded: str) -> None:
    """Make sure that a root exists, is a shard pattern or may be a hub name.

    Args:
        root: What the user gave; None stands for the embedded data.
        layout: "auto", or the layout that was asked for.
        looked_for: What may lie at a root.
        embedded: What is taken without a root.

    Raises:
        FileNotFoundError: one line with what may lie at a root.
    """
    if root is None or root.exists():
        return
    if layout in ("auto", "webdataset") and "{" in str(root):
        return
    hub = ""
    if layout in ("auto", "parquet"):
        if is_hub_name(root):
            return
        if not root.is_absolute():
            hub = ", or OWNER/NAME of a hub data set whose OWNER is no folder here"
    raise FileNotFoundError(
        f"data.init_args.root={root}: no such file or folder; expected {looked_for}{hub}; "
        f"correct the path, or leave root out to use the embedded {embedded}"
    )


def is_hub_name(root: Path) -> bool:
    """Whether a root that does not exist may name a data set of the Hugging Face hub.

    What is more likely a misspelt or missing path is none, as the hub is asked again and again for
    half a minute where there is no network: a name below a folder that exists here or that is
    called as folders of data are, and a name of a file.
    """
    if _HUB_NAME.fullmatch(str(root)) is None or root.suffix in _DATA_FILES:
        return False
    owner = root.parent
    return owner.name not in _DATA_FOLDERS and not owner.exists()
