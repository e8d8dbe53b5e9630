"""What the simulated accelerator is asked for: launches, synchronisations, and from which lines.

A launch is one operation on the device. A synchronisation makes the host wait until the device has
done all that it was asked for: a value that is read, a blocking copy, a shape that values decide.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SYNCHRONISING = {
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "equal": "equal",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "bincount": "bincount",
    "repeat_interleave": "repeat_interleave",
    "histc": "histc",
}
"""Operations whose answer, or the shape of it, the host has to know: what they are called here."""


@dataclass
class Counts:
    """Totals, and each line's share.

    Attributes:
        roots: folders whose lines are told apart; the innermost frame below one of them counts.
        passed_over: files below them whose callers' lines count instead.
        launches: by line.
        synchronisations: by kind and line.
        asynchronous_copies: that were asked not to wait.
        operations: launches by operation.
    """

    roots: tuple[str, ...] = ()
    passed_over: frozenset[str] = frozenset()
    launches: Counter[str] = field(default_factory=Counter)
    synchronisations: Counter[tuple[str, str]] = field(default_factory=Counter)
    asynchronous_copies: int = 0
    operations: Counter[str] = field(default_factory=Counter)

    @property
    def synchronised(self) -> int:
        """How often the host waited."""
        return self.synchronisations.total()

    @property
    def launched(self) -> int:
        """How many operations were launched."""
        return self.launches.total()

    def lines(self) -> list[str]:
        """``count  kind  file:line`` of every synchronisation, most often first."""
        return [
            f"{count:5d}  {kind}  {site}"
            for (kind, site), count in self.synchronisations.most_common()
        ]


_counting: list[Counts] = []
_OWN = frozenset(  # the accelerator's files, whose lines are nobody's fault
    str(path) for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")
)


@contextmanager
def counting(*roots: Path, passing_over: Iterable[Path] = ()) -> Iterator[Counts]:
    """Count what runs inside, in every thread.

    Args:
        roots: folders whose lines are told apart.
        passing_over: files below them whose callers' lines count instead.
    """
    files = frozenset(str(path.resolve()) for path in passing_over)
    counts = Counts(tuple(f"{root.resolve()}/" for root in roots), files | _OWN)
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting.remove(counts)


def launched(operation: str) -> None:
    """An operation was launched."""
    for counts in _counting:
        counts.operations[operation] += 1
        counts.launches[_site(counts)] += 1


def synchronised(kind: str) -> None:
    """The host waited for the device."""
    for counts in _counting:
        counts.synchronisations[kind, _site(counts)] += 1


def copied_asynchronously() -> None:
    """A copy between host and device was asked not to wait."""
    for counts in _counting:
        counts.asynchronous_copies += 1


def _site(counts: Counts) -> str:
    """The innermost line below one of the roots; the backward pass has threads of its own."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        root = next((root for root in counts.roots if name.startswith(root)), None)
        if root is not None and name not in counts.passed_over:
            file = Path(name).relative_to(Path(root).parent)
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere" if threading.current_thread() is threading.main_thread() else "backward"
