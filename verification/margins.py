"""All checks of a run in one picture: right code, tolerance, smallest mistake that is rejected.

A column for each check, on a logarithmic axis of relative deviation. Below the tolerance lies what
the right code shows, above it the smallest effect among the mistakes that this check rejects. The
empty bands on both sides of the tolerances are what makes a verdict independent of a machine's
rounding.
"""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

_LOW, _HIGH = -17, 3  # powers of ten of the axis
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 1000, 380, 44, 12, 62
_STYLE = """
  .axis { stroke: #8a929a; stroke-width: .6; opacity: .5; } text { fill: #7a828a;
  font: 11px system-ui, sans-serif; } .right { stroke: #2a7fc0; } .edge { stroke: #59616a; }
  .wrong { stroke: #d2691e; } .right, .wrong { stroke-width: 3.4; stroke-linecap: round; }
  .edge { stroke-width: 2.2; }
"""


def rejected(check: Mapping[str, Any], mistakes: Sequence[Mapping[str, Any]]) -> float | None:
    """Smallest deviation of a mistake that this check rejects; None if it rejects none."""
    if check["tolerance"] is None:
        return None
    seen = [float(m["deviations"].get(check["name"], 0.0)) for m in mistakes]
    seen = [1e6 if math.isnan(size) else min(size, 1e6) for size in seen]
    return min((size for size in seen if size > check["tolerance"]), default=None)


def picture(record: Mapping[str, Any]) -> str:
    """The picture as an SVG element that needs nothing else."""
    columns = [
        (claim.get("theme") or "", check, rejected(check, claim["mistakes"]))
        for claim in record["claims"]
        for check in claim["checks"]
        if check["tolerance"] is not None
    ]
    columns.sort(key=lambda column: (column[0], column[1]["tolerance"]))
    if not columns:
        return ""
    step = (_WIDTH - _LEFT) / len(columns)
    at = [_LEFT + (k + 0.5) * step for k in range(len(columns))]
    dots = [(x, float(check["deviation"])) for x, (_, check, _) in zip(at, columns, strict=True)]
    edges = [(x, float(check["tolerance"])) for x, (_, check, _) in zip(at, columns, strict=True)]
    wrong = [(x, size) for x, (_, _, size) in zip(at, columns, strict=True) if size is not None]
    parts = [*_axis(), *_themes([theme for theme, _, _ in columns], step)]
    parts += [_path("wrong", wrong, 0.0), _path("right", dots, 0.0), _path("edge", edges, step)]
    legend = (
        ("right", "right code"),
        ("edge", "tolerance"),
        ("wrong", "smallest mistake that the check rejects"),
    )
    x = float(_LEFT)
    for name, words in legend:
        parts.append(f"<path class='{name}' d='M{x + 4:.0f} {_HEIGHT - 8}h.1'/>")
        if name == "edge":
            parts.append(f"<path class='{name}' d='M{x:.0f} {_HEIGHT - 8}h9'/>")
        parts.append(f"<text x='{x + 14:.0f}' y='{_HEIGHT - 4}'>{words}</text>")
        x += 30 + 6.1 * len(words)
    return (
        f"<svg class='margins' xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' "
        f"role='img'><title>Relative deviations of {len(columns)} checks</title>"
        f"<style>{_STYLE}</style>{''.join(parts)}</svg>"
    )


def _level(value: float) -> float:
    """Vertical place of a deviation; what is not finite lies at the top."""
    power = math.log10(max(value, 10.0**_LOW)) if math.isfinite(value) else float(_HIGH)
    share = (min(max(power, _LOW), _HIGH) - _LOW) / (_HIGH - _LOW)
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)


def _path(name: str, points: Sequence[tuple[float, float]], width: float) -> str:
    """Dots, or strokes of a width, as one element."""
    length = f"{width:.1f}" if width else ".1"
    marks = "".join(f"M{x - width / 2:.1f} {_level(y):.0f}h{length}" for x, y in points)
    return f"<path class='{name}' d='{marks}' fill='none'/>"


def _axis() -> Iterator[str]:
    for power in range(-16, _HIGH + 1, 4):
        y = _level(10.0**power)
        yield f"<path class='axis' d='M{_LEFT} {y:.0f}H{_WIDTH}'/>"
        label = f"1e{power}" if power else "1"
        yield f"<text x='{_LEFT - 6}' y='{y + 4:.0f}' text-anchor='end'>{label}</text>"


def _themes(themes: Sequence[str], step: float) -> Iterator[str]:
    """Names of the themes below their columns, on two lines in turns."""
    x = float(_LEFT)
    for k, (theme, group) in enumerate(groupby(themes)):
        width = step * len(list(group))
        yield f"<path class='axis' d='M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM + 6}'/>"
        y = _HEIGHT - _BOTTOM + 16 + 13 * (k % 2)
        words = html.escape(theme.replace("_", " "))
        yield f"<text x='{x + width / 2:.1f}' y='{y}' text-anchor='middle'>{words}</text>"
        x += width
