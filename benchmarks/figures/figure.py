"""What a figure consists of, how its runs are kept, and the intervals that it reports."""

import csv
import dataclasses
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture
from scipy.stats import t as student

from diffusion_envs.runs.run_folder import versions

LEVEL = 0.95

HEAD = """# The paper's figures, made again

Figures of "Score as Action" (arXiv 2502.01819), each by one command (the first by
`python -m benchmarks.figures 1`), on problems that two cores can train: problems whose optimum is
known exactly, and the embedded image model. Intervals are 95 % and over training seeds (Student's
t), of differences on the same noise where two things are compared. Every number of this page is
filled in from the data beside it; so is what a sentence says of an interval.
"""

OTHERS = """## The other pictures

- before and after, in the README: `make demo`, then `python -m benchmarks.before_after runs/demo`;
- a report, in [Read the curves](howto/reading_a_run.md): after the same demo
  `python -m benchmarks.report_screenshots runs/demo`, which needs Chromium;
- the pages of theory: `python -m benchmarks.theory_plots`; the tutorials, with their text:
  `python -m benchmarks.tutorials`;
- leaderboards, benchmarks and embedded models: the command that their page names;
- the claims: `python -m verification --full --document docs/verification.md`; the layers:
  `python docs/hooks/architecture.py`.
"""


@dataclass(frozen=True)
class Figure:
    """A figure with what it was drawn from.

    Attributes:
        title: of its section.
        settings: what it was made with.
        data: one flat row for each number or interval that is drawn or told.
        picture: the drawing.
        paragraph: Markdown: what is shown, what agrees with the paper, what does not, and why.
    """

    title: str
    settings: Mapping[str, Any]
    data: Sequence[Mapping[str, Any]]
    picture: Picture
    paragraph: str


def write(figure: Figure, number: int, output: Path) -> None:
    """Write data, picture and paragraph of a figure into ``output / "figures"``."""
    folder = output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": figure.settings, "versions": versions(), "rows": figure.data}
    (folder / f"{number}.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    with (folder / f"{number}.csv").open("w", newline="") as file:
        columns = list(dict.fromkeys(key for row in figure.data for key in row))
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(figure.data)
    figure.picture.savefig(folder / f"{number}.png", dpi=110)
    (folder / f"{number}.md").write_text(
        f"## Figure {number}. {figure.title}\n\n{figure.paragraph.strip()}\n\n"
        f"![Figure {number}](figures/{number}.png)\n\n"
        f"[All numbers](figures/{number}.csv), [with settings](figures/{number}.json).\n"
    )


def assemble(output: Path) -> Path:
    """Write ``figures.md`` from the paragraphs that are there; returns its path.

    What makes the documentation's other pictures stands at its end.
    """
    fragments = sorted((output / "figures").glob("[0-9].md"))
    page = output / "figures.md"
    page.write_text("\n".join([HEAD, *(path.read_text() for path in fragments), OTHERS]))
    return page


# -- runs that are kept ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Single runs as JSON files in ``output / "figures" / "runs"``; one that is there is not made.

    Attributes:
        output: folder of the results.
    """

    output: Path

    def get(self, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The run with these settings, read or made now; written whole or not at all.

        Args:
            key: everything that the run depends on.
            make: runs it.
        """
        path = self.path(key)
        if path.exists():
            return json.loads(path.read_text())["result"]
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"key": key, "result": result}) + "\n")
        partial.replace(path)
        print(path.name, flush=True)
        return result

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where a run is kept."""
        text = json.dumps(key, sort_keys=True, default=str)
        words = "-".join(str(key[k]) for k in ("figure", "part", "method", "seed") if k in key)
        plain = "".join(c if c.isalnum() else "-" for c in words)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return self.output / "figures" / "runs" / f"{plain}-{digest}.json"


# -- intervals ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean over training seeds with its confidence interval; prints as ``+0.12 [+0.01, +0.23]``.

    Attributes:
        mean: over the seeds.
        low: lower end; minus infinity for a single seed.
        high: upper end.
        seeds: how many.
    """

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.high < 0

    def verdict(self, above: str, below: str, neither: str) -> str:
        """The words that go with where the interval lies."""
        return above if self.above_zero else below if self.below_zero else neither


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Student's t interval of the mean of independent values.

    Args:
        values: one for each seed.
        level: chance that the interval covers, for normal values.

    Raises:
        ValueError: there are none, or one is not finite.
    """
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"values must be finite and at least one, got {list(values)}")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half_width = float(student.ppf(0.5 + level / 2, n - 1)) * statistics.stdev(values) / n**0.5
    return Interval(mean, mean - half_width, mean + half_width, n)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Interval:
    """Interval of ``first - second``, seed by seed.

    Raises:
        ValueError: the seeds differ.
    """
    if set(first) != set(second):
        raise ValueError(f"seeds must be the same, got {sorted(first)} and {sorted(second)}")
    return interval([first[seed] - second[seed] for seed in sorted(first)])


def row(quantity: str, value: Interval, **where: Any) -> dict[str, Any]:
    """A row of data: where it belongs, what it is, its interval."""
    return where | {"quantity": quantity} | dataclasses.asdict(value)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))
