"""The report's plots, as SVG on white; matplotlib is loaded when the first is drawn."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

_BLUE = "#2264b0"
_COLOURS = (_BLUE, "#c65f10", "#2a7f4f", "#7b4aa0", "#b3261e", "#4d4d4d", "#0f8b8d", "#a8851a")
_MARKERS = "osD^vP*"  # 7 and 8 have no common divisor: 56 samplers are told apart
_WIDTH = 1.96  # standard errors either side of a mean: a 95 % interval
_Point = tuple[int | float, Mapping[str, Any]]  # where, and the estimate there


def decimals(error: float) -> int:
    """Digits behind the point that show a standard error to two figures."""
    return max(0, 1 - math.floor(math.log10(error)))


def _half_width(estimate: Mapping[str, Any]) -> float:
    return _WIDTH * (estimate["standard_error"] or 0)


def curve(points: Sequence[_Point], across: str, up: str) -> bytes:
    """Estimates along an axis, with a band of 95 % intervals."""
    return _svg(_curve(points, across, up))


def _curve(points: Sequence[_Point], across: str, up: str) -> Any:
    from matplotlib.ticker import EngFormatter

    figure, axes = _axes(across, up, size=(3.7, 2.6))
    x = [where for where, _ in points]
    y = [estimate["mean"] for _, estimate in points]
    half = [_half_width(estimate) for _, estimate in points]
    low, high = ([a + sign * b for a, b in zip(y, half, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=_BLUE, alpha=0.18, linewidth=0)
    axes.plot(x, y, color=_BLUE, linewidth=1.6, marker="." if len(x) < 60 else None)
    axes.locator_params(axis="x", nbins=6, integer=True)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k
    return figure


def transfer(rows: Sequence[Mapping[str, Any]], parts: Sequence[str], up: str) -> bytes:
    """Parts of transfer rows against the number of steps, one colour a sampler, 95 % intervals."""
    return _svg(_transfer(rows, parts, up))


def _transfer(rows: Sequence[Mapping[str, Any]], parts: Sequence[str], up: str) -> Any:
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    columns = 2 if max(len(name) for name in samplers) <= 26 else 1
    size = (5.2, 3.0 + 0.22 * math.ceil(len(samplers) / columns))  # with room for the legend
    figure, axes = _axes("sampling steps", up, size)
    for k, sampler in enumerate(samplers):
        mine = sorted((row for row in rows if row["sampler"] == sampler), key=lambda r: r["steps"])
        for part in parts:
            former = part == "before"
            axes.errorbar(
                [
                    row["steps"] * 1.02 ** (k - (len(samplers) - 1) / 2) for row in mine
                ],  # side by side
                [row[part]["mean"] for row in mine],
                [_half_width(row[part]) for row in mine],
                color=_COLOURS[k % len(_COLOURS)],
                linestyle="--" if former else "-",
                marker=_MARKERS[k % len(_MARKERS)],
                markersize=5,
                markerfacecolor="white" if former else None,
                capsize=3,
                linewidth=1.4,
                label=textwrap.shorten(sampler, 60, placeholder="…") if not former else None,
            )
    if "difference" in parts:
        axes.axhline(0, color="#888", linewidth=0.8)
    steps = sorted({row["steps"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()
    figure.legend(loc="outside upper left", frameon=False, ncols=columns, fontsize="small")
    return figure


def _axes(across: str, up: str, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    per_line = round(10 * size[1])  # letters that fit along the axis
    axes.set(xlabel=across, ylabel=textwrap.fill(up, per_line))
    axes.grid(color="#e4e7ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> bytes:
    """The same bytes for the same plot: no date, no random ids."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
