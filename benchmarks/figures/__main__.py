"""Make a figure of the paper again: data, picture and a paragraph, and the page of all of them.

    python -m benchmarks.figures 1
    python -m benchmarks.figures 2 --budget gpu --output DIR
    python -m benchmarks.figures 3 --data ../shared/data/cifar10

Writes DIR/figures/N.json, N.csv, N.png and N.md, and assembles DIR/figures.md from all that are
there. Every single run is kept in DIR/figures/runs, so that a figure that was interrupted goes on.
"""

import dataclasses
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import tyro

from benchmarks.figures.figure import assemble, write

NAMES = ("one", "two", "three", "four", "five")
DOCS = Path(__file__).parent.parent.parent / "docs"


@dataclass(frozen=True)
class Options:
    """Which figure, and how much may be spent on it.

    Attributes:
        number: of the figure in the paper.
        budget: cpu (under 30 minutes on two cores) or gpu.
        output: folder of the results.
        seeds: of training; the budget's own, if left out.
        data: folder of CIFAR-10, for Figures 3 and 4; ../shared/data/cifar10, if left out.
    """

    number: tyro.conf.Positional[int]
    budget: str = "cpu"
    output: Path = DOCS
    seeds: int | None = None
    data: Path | None = None


def module_of(number: int) -> ModuleType:
    """The module that makes a figure.

    Raises:
        ValueError: there is none.
    """
    there = [
        k for k, name in enumerate(NAMES, 1) if importlib.util.find_spec(f"{__package__}.{name}")
    ]
    if number not in there:
        raise ValueError(f"figure must be one of {', '.join(map(str, there))}, got {number}")
    return importlib.import_module(f"{__package__}.{NAMES[number - 1]}")


def main(options: Options) -> None:
    """Run what is missing, write the figure, assemble the page.

    Raises:
        ValueError: there is no such figure or budget, a number of seeds that tells no interval, or
            data for a figure that reads none.
        FileNotFoundError: there is no CIFAR-10 where it should be.
    """
    module = module_of(options.number)
    if options.budget not in module.BUDGETS:
        known = ", ".join(module.BUDGETS)
        raise ValueError(f"budget must be one of {known}, got {options.budget!r}")
    budget = module.BUDGETS[options.budget]
    seeds = budget.seeds if options.seeds is None else options.seeds
    if seeds < 2:
        raise ValueError(f"seeds must be at least 2 to tell an interval, got {seeds}")
    if options.data is not None:
        if not hasattr(budget, "data"):
            raise ValueError(f"figure {options.number} reads no data: leave out --data")
        budget = dataclasses.replace(budget, data=options.data)
    torch.set_num_threads(1)
    write(module.run(budget, options.output, seeds), options.number, options.output)
    assemble(options.output)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error
