"""Curves of a report as SVG that stands in the page itself: its text, colours and dark mode.

No library draws them, so that a report with dozens is written at once. A long curve is drawn by
bins: the mean of each, and a band from the least to the greatest value within it.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

STYLE = """
.chart { display: block; width: 100%; height: auto; } .chart text { fill: var(--soft);
  font: 12px system-ui, sans-serif; } .chart .rule { stroke: var(--line); stroke-width: 1; }
.chart .line { fill: none; stroke: var(--one); stroke-width: 1.8; stroke-linejoin: round; }
.chart .band { fill: var(--one); opacity: .2; } .chart .dot { fill: var(--one); }
.chart .other { fill: var(--two); } .chart .bar { stroke: var(--two); stroke-width: 1.4; }
.choice input { position: absolute; opacity: 0; } .choice label { display: inline-block;
  padding: .25rem .8rem; margin: 0 .3rem .8rem 0; border: 1px solid var(--line);
  border-radius: 1rem; cursor: pointer; background: var(--card); }
.choice input:checked + label { border-color: var(--one); color: var(--one); font-weight: 600; }
.choice input:focus-visible + label { outline: 2px solid var(--one); }
.choice .panel { display: none; }
"""
WIDTH = 1.96  # standard errors either side of a mean: a 95 % interval
LARGE, SMALL = (460.0, 260.0), (300.0, 180.0)  # pixels, where the page is as wide
_MOST = 200  # points that are drawn one by one
_BINS = 100
_MOST_DOTS = 40  # that are drawn beside a line
_DOTS = 60  # points from which on a line needs no dots
_LETTER = 8.0  # pixels, of the widest digits
_TOP, _RIGHT, _BOTTOM = 10.0, 14.0, 38.0
_MARGIN = 0.04  # of the values, above and below
_PREFIXES = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))  # from, unit

Point = tuple[int | float, Mapping[str, Any]]  # where, and the estimate there


def half_width(estimate: Mapping[str, Any]) -> float:
    """Of the 95 % interval; 0 where the error is not known."""
    return WIDTH * (estimate["standard_error"] or 0.0)


@dataclass(frozen=True)
class _Drawn:
    """A point of a line, with its band."""

    x: float
    y: float
    low: float
    high: float


def binned(points: Sequence[Point]) -> list[_Drawn]:
    """Points with their 95 % intervals; of more than 200 the means of 100 bins and their range."""
    if len(points) <= _MOST:
        return [
            _Drawn(float(x), y, y - half_width(estimate), y + half_width(estimate))
            for x, estimate in points
            for y in [float(estimate["mean"])]
        ]
    edges = [round(k * len(points) / _BINS) for k in range(_BINS + 1)]
    drawn = []
    for first, last in pairwise(edges):
        part = points[first:last]
        values = [estimate["mean"] for _, estimate in part]
        x = sum(where for where, _ in part) / len(part)
        drawn.append(_Drawn(x, sum(values) / len(values), min(values), max(values)))
    return drawn


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most some 40 of them, the last among them."""
    return list(points)[:: -max(1, -(-len(points) // _MOST_DOTS))][::-1]


def explained(points: Sequence[Point]) -> str:
    """What line and band are, for a caption."""
    if len(points) <= _MOST:
        return "95 % intervals"
    return f"{len(points):,} updates in {_BINS} bins: the mean of each, and its range"


def chart(
    line: Sequence[Point],
    across: str,
    alt: str,
    *,
    dots: Sequence[Point] = (),
    size: tuple[float, float] = SMALL,
) -> str:
    """A curve with its band, and further points with error bars, as an SVG element.

    Args:
        line: oldest first; it may be empty where there are dots.
        across: what the horizontal axis is, with its unit.
        alt: the same in words.
        dots: drawn beside it in another colour.
        size: pixels, where the page is as wide.
    """
    drawn = binned(line)
    others = binned(_thinned(dots))
    every = [*drawn, *others]
    whole = all(p.x == round(p.x) for p in every)
    across_from, across_to = (end(p.x for p in every) for end in (min, max))
    x_axis = _axis(across_from, across_to, least=1.0 if whole else 0.0)
    lowest, highest = min(p.low for p in every), max(p.high for p in every)
    margin = _MARGIN * (highest - lowest)
    y_axis = _axis(lowest - margin, highest + margin)
    xs, ys = x_axis.ticks, y_axis.ticks
    labels, places = _labels(ys), _labels(xs)
    width, height = size
    left = 10 + _LETTER * max(map(len, labels))
    right = width - max(_RIGHT, _LETTER * len(places[-1]) / 2)
    at_x = partial(x_axis.at, start=left, end=right)
    at_y = partial(y_axis.at, start=height - _BOTTOM, end=_TOP)
    parts = [
        f'<line class="rule" x1="{left:.0f}" x2="{right:.0f}" y1="{at_y(y):.1f}" '
        f'y2="{at_y(y):.1f}"/><text x="{left - 6:.0f}" y="{at_y(y) + 4:.1f}" text-anchor="end">'
        f"{label}</text>"
        for y, label in zip(ys, labels, strict=True)
    ]
    below = f'y="{height - _BOTTOM + 16:.0f}" text-anchor="middle"'
    parts += [
        f'<text x="{at_x(x):.1f}" {below}>{label}</text>'
        for x, label in zip(xs, places, strict=True)
    ]
    parts.append(
        f'<text x="{(left + right) / 2:.0f}" y="{height - 6:.0f}" text-anchor="middle">'
        f"{html.escape(across)}</text>"
    )
    around = [(p.x, p.high) for p in drawn] + [(p.x, p.low) for p in reversed(drawn)]
    corners = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in around)
    parts.append(f'<polygon class="band" points="{corners}"/>')
    path = " ".join(f"{at_x(p.x):.1f},{at_y(p.y):.1f}" for p in drawn)
    parts.append(f'<polyline class="line" points="{path}"/>')
    if len(drawn) <= _DOTS:
        parts += [_dot(p, "dot", at_x, at_y) for p in drawn]
    for p in others:
        x = f"{at_x(p.x):.1f}"
        parts.append(
            f'<line class="bar" x1="{x}" x2="{x}" y1="{at_y(p.low):.1f}" y2="{at_y(p.high):.1f}"/>'
        )
        parts.append(_dot(p, "other", at_x, at_y))
    return (
        f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{html.escape(alt)}">{"".join(parts)}</svg>'
    )


def choice(panels: Mapping[str, str], name: str) -> str:
    """One of several panels at a time, chosen by buttons that need no script; the first at first.

    Args:
        panels: content by the button's words.
        name: of the choice, unlike every other's.
    """
    buttons, shown, rules = [], [], []
    for k, (words, content) in enumerate(panels.items()):
        own = f"{name}-{k}"
        checked = " checked" if k == 0 else ""
        buttons.append(
            f'<input type="radio" name="{name}" id="{own}"{checked}>'
            f'<label for="{own}">{html.escape(words)}</label>'
        )
        shown.append(f'<div class="panel {own}">{content}</div>')
        rules.append(f"#{own}:checked ~ .{own} {{ display: block; }}")
    return f'<style>{" ".join(rules)}</style><div class="choice">{"".join(buttons + shown)}</div>'


def _dot(
    p: _Drawn, kind: str, at_x: Callable[[float], float], at_y: Callable[[float], float]
) -> str:
    half = p.high - p.y
    words = f"{_short(p.x)}: {p.y:.4g}" + (f" ± {half:.2g} (95 %)" if half else "")
    radius = 3.2 if kind == "other" else 2.2
    return (
        f'<circle class="{kind}" cx="{at_x(p.x):.1f}" cy="{at_y(p.y):.1f}" r="{radius}">'
        f"<title>{words}</title></circle>"
    )


@dataclass(frozen=True)
class _Axis:
    """Its ends, and round numbers between them."""

    low: float
    high: float
    ticks: Sequence[float]

    def at(self, value: float, start: float, end: float) -> float:
        """Where a value is between two pixels."""
        return start + (end - start) * (value - self.low) / (self.high - self.low)


def _axis(low: float, high: float, least: float = 0.0) -> _Axis:
    """An axis over some values, with ticks at least so far apart."""
    if not high > low:
        margin = abs(low) * 0.1 or 1.0
        low, high = (low - margin, high + margin) if low else (0.0, 1.0)
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(least, next((m * power for m in (1, 2, 5) if m * power >= raw), 10 * power))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last <= first:  # least is large
        first, last = math.floor(low / step), math.ceil(high / step)
        low, high = first * step, last * step
    return _Axis(low, high, [k * step for k in range(first, last + 1)])


def _labels(ticks: Sequence[float]) -> list[str]:
    """All with the same prefix and number of digits."""
    largest = max(abs(t) for t in ticks)
    if 0 < largest < 1e-3:
        return [f"{t:.3g}".replace("-", "\N{MINUS SIGN}") if t else "0" for t in ticks]
    unit, prefix = next((p[1:] for p in _PREFIXES if largest >= p[0]), (1.0, ""))
    step = abs(ticks[1] - ticks[0]) / unit
    digits = next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)
    return [
        f"{t / unit:.{digits}f}{prefix if t else ''}".replace("-", "\N{MINUS SIGN}") for t in ticks
    ]


def _short(x: float) -> str:
    return f"{x:,.0f}" if x == round(x) else f"{x:,.4g}"
