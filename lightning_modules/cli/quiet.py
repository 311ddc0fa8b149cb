"""Keeps other people's advertisements and housekeeping warnings off the screen."""

from __future__ import annotations

import logging
import os
import warnings

_NOISE = (
    "💡 Tip",
    "LeafSpec",
    "TPU available",
    "HPU available",
    "already configured with model summary",
)


class _NoiseFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(noise in record.getMessage() for noise in _NOISE)


def hush_advertisements() -> None:
    """Drop Lightning's tips for its cloud and warnings that no user can act on."""
    # Lightning 2.6 calls jsonargparse by names that it has since renamed.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(item, _NoiseFilter) for item in logger.filters):
        logger.addFilter(_NoiseFilter())
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*using the WeightAveraging callback.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    # Predictions carry their own indices.
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices.*")
