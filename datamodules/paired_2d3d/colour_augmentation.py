"""Changes of the colours of points, and the loss of colours and normals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from datamodules.paired_2d3d.view_options import ViewOptions

_LUMA = (np.float32(0.2989), np.float32(0.587), np.float32(0.114))  # ITU-R 601
_TINY = np.float32(1e-12)


def augment_colour(
    colour: NDArray[np.float32], options: ViewOptions, generator: np.random.Generator
) -> NDArray[np.float32]:
    """Brightness, contrast, saturation and hue in random order, then an offset a channel.

    Args:
        colour: (N, 3) in [0, 1]; not written to.
        options: how much, and how often.
        generator: keyed by the sample; asked for the same numbers whatever the chances.

    Returns:
        (N, 3) in [0, 1].
    """
    changes: tuple[Callable[[NDArray[np.float32], np.float32], None], ...]
    changes = (scale_brightness, scale_contrast, scale_saturation, turn_hue)
    spans = (options.brightness, options.contrast, options.saturation)
    factors = [generator.uniform(max(0.0, 1 - span), 1 + span) for span in spans]
    factors.append(generator.uniform(-options.hue, options.hue))
    chosen = generator.random(len(changes)) < options.colour_jitter_chance
    order = generator.permutation(len(changes))
    offset = generator.uniform(-options.colour_shift, options.colour_shift, size=(3, 1))
    shifted = generator.random() < options.colour_shift_chance
    planes = colour.T.copy()  # (3, N), so that every channel is contiguous
    for number in order.tolist():
        if chosen[number] and (number == len(spans) or spans[number] > 0):
            changes[number](planes, np.float32(factors[number]))
    if shifted:
        planes += offset.astype(np.float32)
        planes.clip(0, 1, out=planes)
    return np.ascontiguousarray(planes.T)


def _grey(planes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Luma (N,) of colours (3, N)."""
    grey: NDArray[np.float32] = planes[0] * _LUMA[0] + planes[1] * _LUMA[1] + planes[2] * _LUMA[2]
    return grey


def scale_brightness(planes: NDArray[np.float32], factor: np.float32) -> None:
    """Multiply colours (3, N) by a factor >= 0, in place."""
    planes *= factor
    np.minimum(planes, 1, out=planes)


def scale_contrast(planes: NDArray[np.float32], factor: np.float32) -> None:
    """Move colours (3, N) from (factor > 1) or to their mean grey, in place."""
    mean = np.float32(_grey(planes).mean(dtype=np.float64)) if planes.size else np.float32(0)
    planes *= factor
    planes += mean * (1 - factor)
    planes.clip(0, 1, out=planes)


def scale_saturation(planes: NDArray[np.float32], factor: np.float32) -> None:
    """Move colours (3, N) from (factor > 1) or to their own grey, in place."""
    grey = _grey(planes) * (1 - factor)
    planes *= factor
    planes += grey
    planes.clip(0, 1, out=planes)


def turn_hue(planes: NDArray[np.float32], turn: np.float32) -> None:
    """Turn the HSV hue of colours (3, N) by a share of the circle, in place."""
    red, green, blue = planes
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    safe = np.maximum(chroma, _TINY)
    # Sextant of the circle, counted from the channel that is largest.
    hue = np.where(
        value == red,
        (green - blue) / safe,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue += turn * 6
    for channel, phase in enumerate((5, 3, 1)):
        place = (hue + phase) % 6
        lack = np.minimum(place, 4 - place).clip(0, 1)
        planes[channel] = value - chroma * lack


def drop_rows(
    values: NDArray[np.float32],
    options: ViewOptions,
    drop_all: float,
    generator: np.random.Generator,
) -> NDArray[np.float32]:
    """Set all rows to zero by chance, or some of them, as where a sensor gives no colour.

    Args:
        values: (N, 3); not written to.
        options: for ``drop_some`` and ``drop_some_share``.
        drop_all: chance that all rows become zero.
        generator: keyed by the sample.

    Returns:
        (N, 3), ``values`` itself if nothing was dropped.
    """
    all_dropped, some_dropped = generator.random(2) < (drop_all, options.drop_some)
    if all_dropped:
        return np.zeros_like(values)
    count = int(len(values) * options.drop_some_share)
    if not some_dropped or count == 0:
        return values
    kept = values.copy()
    kept[generator.choice(len(values), count, replace=False, shuffle=False)] = 0
    return kept
