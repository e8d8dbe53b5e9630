"""A progress bar with the current numbers beside it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffusion_envs.runs.callbacks import Callback

_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=24),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[numbers]}"),
)


@contextmanager
def progress_bar(
    name: str, total: int, *, done: int = 0, shown: bool = True
) -> Iterator[Callable[[str], None]]:
    """Within the context, call the result once a step with a line of numbers."""
    with Progress(*_COLUMNS, disable=not shown) as progress:
        task = progress.add_task(name, total=total, completed=done, numbers="")
        yield lambda numbers: progress.update(task, advance=1, numbers=numbers)


class ProgressBar(Callback):
    """Shows updates done and their reward, as a callback."""

    def __init__(self, total: int, *, done: int = 0, shown: bool = True) -> None:
        self._progress = Progress(*_COLUMNS, disable=not shown)
        self._task = self._progress.add_task("fine-tuning", total=total, completed=done, numbers="")

    def begin(self) -> None:
        """Show the bar."""
        self._progress.start()

    def after(self, numbers: Mapping[str, Any]) -> None:
        """Advance to this update."""
        nats = f"  path KL {numbers['path_kl']} nats" if "path_kl" in numbers else ""
        words = f"reward {numbers['reward']}{nats}"
        self._progress.update(self._task, completed=numbers["update"], numbers=words)

    def end(self) -> None:
        """Stop the bar, which stays on the screen."""
        self._progress.stop()
