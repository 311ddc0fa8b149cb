"""Checks of the sizes of encoder and decoder, which have a number for each level."""

from typing import Protocol


class LevelSizes(Protocol):
    """What is read here of an encoder's or a decoder's shape."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Width of each level."""

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level."""


def check_levels(sizes: LevelSizes, *numbers: str) -> None:
    """Make tuples of channels, heads and depths, which a checkpoint hands back as lists.

    Args:
        sizes: A frozen dataclass with these fields.
        numbers: Names of further fields that must be at least 1.

    Raises:
        ValueError: If a number is below 1 or missing, or heads do not divide their level's width.
    """
    for name in ("channels", "heads", "depths"):
        values = tuple(getattr(sizes, name))
        object.__setattr__(sizes, name, values)
        if not values or min(values) < 1 or len(values) != len(sizes.channels):
            raise ValueError(f"{name}={values}: one number >= 1 for each level is needed")
    for name in numbers:
        if getattr(sizes, name) < 1:
            raise ValueError(f"{name}={getattr(sizes, name)}: must be >= 1")
    for width, count in zip(sizes.channels, sizes.heads, strict=True):
        if width % count:
            raise ValueError(f"channels={width}: must be a multiple of its heads={count}")
