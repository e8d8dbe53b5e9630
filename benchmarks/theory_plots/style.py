"""How the pictures look: transparent, and readable on light and on dark pages."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = Path(__file__).parents[2] / "docs" / "theory" / "plots"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#3f88e8", "#e07b10", "#22a07a", "#a46bd6", "#888888"
"""Colours that keep a contrast of at least 2.5 on white and on black, and differ in lightness."""

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "theory",  # ids that do not change
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.titlesize": 10,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}


def panels(count: int = 1, height: float = 2.9) -> tuple[Figure, Sequence[Axes]]:
    """A figure with so many axes in a row, 3.6 inches each."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(3.7 * count + 0.6 * (count == 1), height), layout="constrained")
        axes = [figure.add_subplot(1, count, k + 1) for k in range(count)]
    figure.patch.set_alpha(0)
    for each in axes:
        each.patch.set_alpha(0)
    return figure, axes


def save(figure: Figure, name: str, folder: Path = FOLDER) -> Path:
    """Write a picture and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.svg"
    with matplotlib.rc_context(_SETTINGS):
        for axes in figure.axes:
            for words in axes.texts:
                words.set_color(GREY)
            if axes.get_legend_handles_labels()[1]:
                axes.legend()
        figure.savefig(file, transparent=True, metadata={"Date": None})
    text = "\n".join(line.rstrip() for line in file.read_text().splitlines())
    file.write_text(_numbered(text) + "\n")
    return file


def _numbered(svg: str) -> str:
    """Ids in the order of their appearance: matplotlib's are hashes of all digits of a place."""
    names: dict[str, str] = {}
    return re.sub(r"\b[mp][0-9a-f]{10}\b", lambda m: names.setdefault(m[0], f"id{len(names)}"), svg)
