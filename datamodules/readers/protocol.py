"""What a reader is: labelled images of one split, addressed by position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Split = Literal["train", "val", "test"]
"""Names of the splits that a data set on disk may have."""


class ImageReader(Protocol):
    """Random access to one split on disk; safe to use after a fork and to pickle."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of every class, in label order."""
        ...

    @property
    def fingerprint(self) -> str:
        """Text that changes when the files do, found without reading all of them."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def label(self, position: int) -> int:
        """Class of a sample, 0 .. number of classes - 1.

        Raises:
            SampleError: if the stored label is no such number.
        """
        ...

    def read(self, position: int) -> bytes | NDArray[np.uint8]:
        """An encoded image file, or pixels (H, W, C).

        Raises:
            SampleError: if it cannot be read.
        """
        ...

    def sample_id(self, position: int) -> str:
        """File, and row or member, of a sample, for error messages."""
        ...
