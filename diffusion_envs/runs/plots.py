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
_FAR = 3.0  # times the KL up to which the frontier is known: from there on its root is drawn


def decimals(error: float) -> int:
    """Digits behind the point that show a standard error to two figures."""
    return max(0, 1 - math.floor(math.log10(error)))


def _half_width(estimate: Mapping[str, Any]) -> float:
    return _WIDTH * (estimate["standard_error"] or 0)


def frontier(
    curve: Sequence[Mapping[str, Any]],
    run: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    up: str,
    finished: bool,
) -> bytes:
    """The most reward at each KL and a run's own path, with 95 % intervals.

    Args:
        curve: points as ``FrontierPoint.as_dict`` has them, from 0 nats on; those that are not
            known come last.
        run: (KL, reward) of its evaluations, oldest first.
        up: what the reward is.
        finished: the last of them is the exported model.
    """
    return _svg(_frontier(curve, run, up, finished))


def _frontier(
    curve: Sequence[Mapping[str, Any]],
    run: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    up: str,
    finished: bool,
) -> Any:
    from matplotlib.ticker import EngFormatter

    figure, axes = _axes("KL from the pretrained model (nats)", up, size=(6.4, 3.9))
    known = [point for point in curve if point["known"]]
    unknown = curve[max(0, len(known) - 1) :]  # from the last known one on
    if known:
        _best(axes, known, _BLUE, "-", "the most that a policy can have")
    if len(unknown) > 1 or not known:
        _best(axes, unknown, "#777777", "--", "unknown: what too few samples show of it")
    nats, reward = ([pair[k]["mean"] for pair in run] for k in (0, 1))
    colour = _COLOURS[1]
    axes.plot(nats, reward, color=colour, linewidth=1.4, marker=".", label="this run")
    if finished:
        across, along = ([_half_width(estimate)] for estimate in run[-1])
        end = (nats[-1:], reward[-1:], along, across)
        axes.errorbar(*end, color=colour, marker="D", markersize=6, capsize=3, label="exported")
    if nats and max(nats) > _FAR * max((point["kl"]["mean"] for point in known), default=0.0):
        axes.set_xscale("function", functions=(_root, _square))  # the known part stays visible
        axes.set_xticks([float(f"{max(nats) * (k / 4) ** 2:.1g}") for k in range(5)])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    # the band of the unknown part may reach far beyond everything else
    ends = [point["reward"][end] for point in known for end in ("low", "high")]
    seen = [*ends, *(point["reward"]["mean"] for point in unknown), *reward]
    if finished:
        half = _half_width(run[-1][1])
        seen += [reward[-1] - half, reward[-1] + half]
    margin = 0.08 * (max(seen) - min(seen)) or 1.0
    axes.set_ylim(min(seen) - margin, max(seen) + margin)
    figure.legend(loc="outside upper left", frameon=False, ncols=2, fontsize="small")
    return figure


def _best(
    axes: Any, points: Sequence[Mapping[str, Any]], colour: str, line: str, label: str
) -> None:
    """A part of the frontier; where nothing bounds it, its band has a gap."""
    x = [point["kl"]["mean"] for point in points]
    ends = [
        [math.nan if (value := point["reward"][end]) is None else value for point in points]
        for end in ("low", "high")
    ]
    axes.fill_between(x, *ends, color=colour, alpha=0.18, linewidth=0)
    y = [point["reward"]["mean"] for point in points]
    axes.plot(x, y, color=colour, linewidth=1.6, linestyle=line, label=label)


def _root(nats: Any) -> Any:
    return abs(nats) ** 0.5


def _square(root: Any) -> Any:
    return root**2


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
                label=None if former else _name(sampler),
            )
    if "difference" in parts:
        axes.axhline(0, color="#888", linewidth=0.8)
    steps = sorted({row["steps"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()
    figure.legend(loc="outside upper left", frameon=False, ncols=columns, fontsize="small")
    return figure


def _name(sampler: str) -> str:
    """As it is: what matplotlib would take for mathematics is not."""
    return textwrap.shorten(sampler, 60, placeholder="…").replace("$", r"\$")


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
