"""A progress bar with the current numbers beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bar(
    name: str, total: int, *, done: int = 0, shown: bool = True
) -> Iterator[Callable[[str], None]]:
    """Within the context, call the result once a step with a line of numbers."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, disable=not shown) as progress:
        task = progress.add_task(name, total=total, completed=done, numbers="")
        yield lambda numbers: progress.update(task, advance=1, numbers=numbers)
