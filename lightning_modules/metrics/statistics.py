"""Mean and covariance of image features, and reading published ones."""

import hashlib
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class FeatureStatistics(NamedTuple):
    """The Gaussian that a Fréchet distance compares.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, unbiased.
        images: how many images are behind it; ``None`` if the source does not say.
        source: where it comes from, for reports.
    """

    mean: Tensor
    covariance: Tensor
    images: int | None
    source: str


def statistics_from_sums(
    total: Tensor, outer: Tensor, count: int, source: str
) -> FeatureStatistics:
    """Turns the sums over images of f (D,) and of f f^T (D, D) into mean and covariance.

    Raises:
        ValueError: fewer than two images, so there is no covariance.
    """
    if count < 2:
        raise ValueError(f"{count} {source}: a Fréchet distance needs at least 2; update() first")
    mean = total / count
    covariance = (outer - count * torch.outer(mean, mean)) / (count - 1)
    return FeatureStatistics(mean, covariance, count, source)


def load_reference_statistics(path: Path) -> FeatureStatistics:
    """Reads an npz with arrays ``mu`` (D,) and ``sigma`` (D, D), as the ADM evaluator ships them.

    Other arrays in the file (ADM also stores reference images) are not read. ``source`` holds the
    file name and the start of the SHA-256 of both arrays, so that two reports can be compared.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no npz, pickled content, missing arrays, or shapes that do not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an npz with arrays mu and sigma")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"mu", "sigma"} - set(arrays.files)
            if missing:
                raise ValueError(f"it lacks {' and '.join(sorted(missing))}")
            mean, covariance = (np.asarray(arrays[key], np.float64) for key in ("mu", "sigma"))
    except (ValueError, AttributeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: no reference statistics ({error}); expected an npz with plain arrays "
            "mu (D,) and sigma (D, D)"
        ) from error
    _check_moments(path, mean, covariance)
    digest = hashlib.sha256(mean.tobytes() + covariance.tobytes()).hexdigest()
    return FeatureStatistics(
        torch.from_numpy(mean),
        torch.from_numpy(covariance),
        None,
        f"{path.name} (sha256 {digest[:12]})",
    )


def _check_moments(path: Path, mean: np.ndarray, covariance: np.ndarray) -> None:
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise ValueError(
            f"{path}: mu {mean.shape} and sigma {covariance.shape}: must be (D,) and (D, D)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: mu or sigma holds NaN or infinity: must be finite")
    if not np.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-8):
        raise ValueError(f"{path}: sigma is not symmetric: it must be a covariance")
