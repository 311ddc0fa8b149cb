"""Curves as an SVG that stands inside a page and takes the page's colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from lightning_modules.run_contents import Curve

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 540, 220, 56, 22, 20
# Beyond this ratio of largest to smallest value the axis is logarithmic.
_LOG_FROM = 20.0
_MOST_POINTS = 400


def draw_curves_svg(curves: Sequence[Curve]) -> str:
    """Draw curves over training steps; the first one in ``--train``, the next in ``--val``.

    Args:
        curves: At least one, each of two points or more with finite values.
    """
    values = [value for curve in curves for _, value in curve.points]
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > _LOG_FROM
    last = max(step for curve in curves for step, _ in curve.points)
    first = min(step for curve in curves for step, _ in curve.points)
    scale: Callable[[float], float] = math.log if is_log else float
    height = (scale(high) - scale(low)) or 1.0
    width = (last - first) or 1.0

    def place(step: float, value: float) -> str:
        across = _LEFT + (step - first) / width * (_WIDTH - _LEFT - 8)
        up = (scale(value) - scale(low)) / height * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{_HEIGHT - _BOTTOM - up:.1f}"

    lines = []
    for number, curve in enumerate(curves):
        colour = "var(--train)" if number == 0 else "var(--val)"
        stride = 1 + len(curve.points) // _MOST_POINTS
        points = " ".join(place(*point) for point in curve.points[::stride])
        lines.append(
            f'<polyline points="{points}" style="fill:none;stroke:{colour};stroke-width:1.6"/>'
            f'<text x="{_LEFT + 110 * number}" y="12" style="fill:{colour}">'
            f"{escape(curve.name)}</text>"
        )
    base = _HEIGHT - _BOTTOM
    suffix = ", log" if is_log else ""
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" font-size="11" fill="currentColor" '
        f'aria-label="losses over steps">{"".join(lines)}'
        f'<path d="M{_LEFT} {_TOP}V{base}H{_WIDTH - 8}" fill="none" stroke="currentColor"/>'
        f'<text x="{_LEFT - 4}" y="{_TOP + 4}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{_LEFT - 4}" y="{base}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}">{first:.0f}</text>'
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" text-anchor="end">step {last:.0f}{suffix}</text>'
        "</svg>"
    )
