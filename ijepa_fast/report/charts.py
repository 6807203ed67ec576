"""Line charts as inline SVG: text that can be selected, colours that follow the page's light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 8, 24
_MOST_POINTS = 400


def chart(title: str, lines: dict[str, Points]) -> str:
    """A figure with one panel: values over steps.

    Args:
        title: with the unit.
        lines: label -> (step, value), at least one point each; values are finite.
    """
    points = [point for line in lines.values() for point in line]
    steps = _ticks(min(x for x, _ in points), max(x for x, _ in points), 4, whole=True)
    values = _ticks(min(y for _, y in points), max(y for _, y in points), 4)
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = values[0], values[-1]
    width, height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return _LEFT + across * width, _TOP + (y_high - y) / (y_high - y_low) * height

    parts = []
    for value in values:
        _, y = at(x_low, value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{compact(value)}</text>')
    for step in steps:
        if x_low <= step <= x_high:
            x, _ = at(step, y_low)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{compact(step)}</text>')
    for number, line in enumerate(lines.values(), start=1):
        places = [at(*point) for point in thinned(line)]
        if len(places) == 1:
            parts.append(f'<circle class="dot{number}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3.5"/>')
        else:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            parts.append(f'<path class="line line{number}" d="M{path}"/>')

    legend = "".join(
        f'<span><svg class="key" viewBox="0 0 22 8" aria-hidden="true"><path class="line line{number}" d="M1 4H21"/>'
        f"</svg>{escape(label)} <b>{compact(line[-1][1])}</b></span>"
        for number, (label, line) in enumerate(lines.items(), start=1)
    )
    told = "; ".join(
        f"{label}: {compact(line[0][1])} at step {compact(line[0][0])}, {compact(line[-1][1])} at step "
        f"{compact(line[-1][0])}, lowest {compact(min(y for _, y in line))}, highest {compact(max(y for _, y in line))}"
        for label, line in lines.items()
    )
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3><div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title} over steps. {told}")}">'
        f"{''.join(parts)}</svg></figure>"
    )


def compact(value: float) -> str:
    """A number in at most four significant digits; thousands and millions as k and M, small ones as 2.75e-4."""
    if 0 < abs(value) < 1e-2:
        digits, exponent = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    for size, suffix in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.4g}{suffix}"
    return f"{value:.4g}"


def thinned(line: Points) -> list[tuple[float, float]]:
    """A line of few points that looks the same: of each stretch of many its lowest and highest, in order."""
    if len(line) <= _MOST_POINTS:
        return list(line)
    stretch = math.ceil(2 * len(line) / _MOST_POINTS)
    kept = {0, len(line) - 1}
    for start in range(0, len(line), stretch):
        places = range(start, min(start + stretch, len(line)))
        kept |= {min(places, key=lambda i: line[i][1]), max(places, key=lambda i: line[i][1])}
    return [line[i] for i in sorted(kept)]


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers around [low, high], at least two."""
    if high == low:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * nice for nice in (1, 2, 2.5, 5, 10) if size * nice >= rough * 0.999)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Counted in steps, so that zero is 0 and not what rounding leaves of it.
    return [count * step for count in range(first, max(last, first + 1) + 1)]
