"""Rewards by prompt over a run's training: what its earlier and its later samples earned."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ctrl import Estimate


@dataclass
class _Sums:
    """Of rewards: number, sum and sum of squares."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, mean: float, error: float | None, n: int) -> None:
        """Take in n rewards by their mean and standard error."""
        self.n += n
        self.total += n * mean
        self.squares += n * mean**2 + (0.0 if error is None else n * (n - 1) * error**2)

    def estimate(self) -> Estimate:
        """Mean and standard error of all rewards."""
        mean = self.total / self.n
        if self.n < 2:
            return Estimate(mean, math.inf, self.n)
        variance = max(0.0, self.squares - self.n * mean**2) / (self.n - 1)
        return Estimate(mean, math.sqrt(variance / self.n), self.n)


@dataclass(frozen=True)
class TrainingOfPrompt:
    """Rewards of one prompt in the earlier and the later half of the updates so far."""

    prompt: int  # its place among the run's
    earlier: Estimate
    later: Estimate

    @property
    def difference(self) -> Estimate:
        """Later less earlier; their samples are independent."""
        return Estimate(
            self.later.mean - self.earlier.mean,
            math.hypot(self.later.standard_error, self.earlier.standard_error),
            self.later.n + self.earlier.n,
        )


def training_by_prompt(lines: Iterable[Mapping[str, Any]]) -> list[TrainingOfPrompt]:
    """Every prompt that both halves of the updates have, largest change first.

    Args:
        lines: of ``training_by_prompt.jsonl``, oldest first.
    """
    lines = list(lines)
    if not lines:
        return []
    middle = (lines[0]["update"] + lines[-1]["update"]) / 2
    halves: tuple[dict[int, _Sums], dict[int, _Sums]] = ({}, {})
    for line in lines:
        sums = halves[line["update"] > middle]
        columns = (line[name] for name in ("prompt", "mean", "standard_error", "n"))
        for prompt, mean, error, n in zip(*columns, strict=True):
            sums.setdefault(prompt, _Sums()).add(mean, error, n)
    earlier, later = halves
    seen = [
        TrainingOfPrompt(prompt, earlier[prompt].estimate(), sums.estimate())
        for prompt, sums in later.items()
        if prompt in earlier
    ]
    return sorted(seen, key=lambda each: -each.difference.mean)
