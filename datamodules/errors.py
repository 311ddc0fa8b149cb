"""Errors about data on disk; every message is one line naming the file and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class DataError(ValueError):
    """Data on disk that cannot be used as it is."""


class SampleError(DataError):
    """One sample that cannot be used; ``on_error="skip"`` may step over it."""


@dataclass(frozen=True)
class FaultPolicy:
    """What happens at a sample that cannot be used.

    Attributes:
        on_error: "raise" stops; "skip" puts the next good sample of the split in its place.
        max_skipped_share: largest share of a split's samples that may be skipped, 0 .. 1.
    """

    on_error: Literal["raise", "skip"] = "raise"
    max_skipped_share: float = 0.01


def plain_error(error: DataError) -> DataError:
    """Undo the traceback text that a DataLoader worker puts around an error's message.

    Args:
        error: error as raised by the loader, from this process or from a worker.

    Returns:
        An error of the same type whose message is the one line of the original.
    """
    text = str(error)
    if not text.startswith("Caught "):
        return error
    return type(error)(text.strip().splitlines()[-1].partition(": ")[2])
