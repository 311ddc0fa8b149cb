"""Telling the layout of the data at a root."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from datamodules.errors import DataError

Layout = TypeVar("Layout", bound=str)


def only_layout(root: Path, found: Sequence[Layout]) -> Layout | None:
    """The layout that fits what lies at a root; None if there is none.

    Raises:
        DataError: if several fit.
    """
    if len(found) > 1:
        raise DataError(
            f"{root}: ambiguous, holds {' and '.join(found)}; set data.init_args.format"
        )
    return found[0] if found else None
