"""How often does a run keep its promises when faults are done to it?

Every module of ``ROWS`` has a function ``rows(folder, *, sample)`` that does its faults in
``folder``, ``sample`` for the short part of ``.ci/run``, and yields one ``Row`` for each kind.
"""

import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.faults.row import Row, table

ROWS: tuple[str, ...] = ()  # modules of this package, in the order of the table


def rows_of(module: str, *, sample: bool) -> Iterator[Row]:
    """The rows of one module, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix=f"faults-{module}-") as folder:
        yield from importlib.import_module(f"benchmarks.faults.{module}").rows(
            Path(folder), sample=sample
        )


def main(
    modules: Annotated[tuple[str, ...], tyro.conf.Positional] = ROWS, *, sample: bool = False
) -> None:
    """Do the faults and print the table; the exit code says whether every promise held.

    Args:
        modules: which kinds of faults; all if left out.
        sample: few faults of each kind, as in ``.ci/run``.
    """
    rows = [row for module in modules for row in rows_of(module, sample=sample)]
    print(table(rows))
    sys.exit(0 if rows and all(row.whole for row in rows) else 1)


if __name__ == "__main__":
    tyro.cli(main)
