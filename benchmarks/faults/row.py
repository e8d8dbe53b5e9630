"""One row of the table of faults: what was done, how often, and how often the promise held."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Faults of one kind.

    Attributes:
        fault: what was done to the run.
        where: in which phases, files or inputs, at random or at each.
        promise: what a run has to do all the same.
        tried: faults that were done.
        held: how many of them left the promise kept.
        notes: numbers that belong to it, such as tries by phase, or the first failure.
    """

    fault: str
    where: str
    promise: str
    tried: int
    held: int
    notes: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.held <= self.tried or not self.tried:
            raise ValueError(
                f"held must be at most tried, and tried at least 1: of {self.fault!r} "
                f"{self.held} of {self.tried} held"
            )

    @property
    def whole(self) -> bool:
        """Whether the promise was kept every time."""
        return self.held == self.tried


def table(rows: Sequence[Row]) -> str:
    """The rows as a table of Markdown."""
    lines = ["| fault | where | promise | held | notes |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row.fault} | {row.where} | {row.promise} | {row.held} of {row.tried} | {row.notes} |"
        for row in rows
    ]
    return "\n".join(lines)
