"""How a reduction is attached to a model of a library, and removed without a trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn

from models.token_reduction.selection import Selection

Reduce = Callable[[Tensor, tuple[int, int]], Selection]
"""Chooses among tokens (B, L, C) of a grid (rows, columns) in raster order, L = rows * columns."""


@contextmanager
def shadow_method(owner: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Let ``owner`` answer to ``name`` with ``method``; its class stays as it is.

    Raises:
        ValueError: If the method is shadowed already, as by a reduction of the same model.
    """
    if name in vars(owner):
        raise ValueError(
            f"{type(owner).__name__}.{name}: already replaced; leave the other reduction first"
        )
    stock = getattr(owner, name)

    @wraps(stock)  # callers look at the signature
    def replacement(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return method(*args, **kwargs)

    setattr(owner, name, replacement)
    try:
        yield
    finally:
        delattr(owner, name)


def check_selection(selection: Selection, tokens: Tensor) -> Selection:
    """Return the selection if its mask fits tokens (B, L, C) and keeps at least one of them.

    Raises:
        ValueError: Otherwise.
    """
    if selection.mask.shape != tokens.shape[:2] or not bool(selection.mask.any()):
        raise ValueError(
            f"mask of {tuple(selection.mask.shape)} with {int(selection.mask.sum())} kept: "
            f"expected one of {tuple(tokens.shape[:2])} with at least 1; check the reduce function"
        )
    return selection
